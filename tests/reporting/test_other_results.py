from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from made_runs import DIGITS, STUDENTS, add_results, make_run

from seed_exp.config.identity import effective_options
from seed_exp.reporting.comparison import Table, compare
from seed_exp.reporting.other_results import other_results
from seed_exp.reporting.page.build import page
from seed_exp.reporting.page.content import PageContent
from seed_exp.reporting.runs import read_runs
from seed_exp.reporting.table_formats import comma_separated, markdown

CIFAR = (
    "torchvision:CIFAR10:train:50000:0123456789abcdef",
    "torchvision:CIFAR10:val:10000:fedcba9876543210",
)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Two seeds, evaluated on their own images, and linearly and as a whole on others.

    The first seed is evaluated after half of the steps too.
    """
    for seed in (0, 1):
        folder = make_run(
            tmp_path / f"a{seed}",
            "distill",
            [*DIGITS, STUDENTS, "teacher=moco_v2_r50", f"seed={seed}"],
        )
        add_results(folder, {"convnet_w2": (50 + seed, 60 + seed, 90), "convnet_w32": (70, 80, 95)})
        transfer = {"convnet_w2": (0.0, 40.0 + seed, 77.0)}
        add_results(folder, transfer, evaluations=["finetune"], images=CIFAR, lrs=[0.1])
        if seed == 0:
            add_results(
                folder,
                {"convnet_w2": (0.0, 5.0, 6.0)},
                evaluations=["finetune"],
                images=CIFAR,
                step=50,
                lrs=[0.1],
            )
            add_results(
                folder, {"convnet_w2": (0.0, 33.0, 66.0)}, evaluations=["linear"], images=CIFAR
            )
    runs, problems = read_runs([tmp_path], effective_options)
    assert problems == []
    return compare("digits", runs, [], lambda run, name, like: name)


def test_what_no_cell_shows_is_listed_with_its_images_and_the_mean_over_seeds(table: Table) -> None:
    found = {
        (one.row, one.evaluation, one.images): {
            key: (value.mean, len(value.sources)) for key, value in one.values.items()
        }
        for one in other_results(table)
    }
    assert found == {
        ("convnet_w2", "finetune", "torchvision:CIFAR10:val:10000"): {
            "top1": (40.5, 2),
            "top5": (77.0, 2),
        },
        ("convnet_w2", "linear", "torchvision:CIFAR10:val:10000"): {
            "top1": (33.0, 1),
            "top5": (66.0, 1),
        },
    }


def test_the_column_of_linear_evaluation_is_of_the_images_that_most_runs_were_evaluated_on(
    table: Table,
) -> None:
    assert table.cells["convnet_w2", 0].values["T-1"].mean == 60.5


def test_every_format_has_them(table: Table) -> None:
    rows = [" ".join(line.split()) for line in markdown(table).splitlines()]
    numbers = "top1 40.5 ± 0.7, n=2; top5 77.0 ± 0.0, n=2"
    assert f"| convnet_w2 | finetune | {numbers} |" in rows
    # The columns in which all rows agree.
    assert "Other evaluations, %; setting: all runs; images: torchvision:CIFAR10:val:10000:" in rows
    lines = {
        line["measure"]: line for line in csv.DictReader(io.StringIO(comma_separated([table])))
    }
    assert float(lines["finetune top1 on torchvision:CIFAR10:val:10000"]["ours"]) == 40.5
    text = page(
        PageContent(
            "A report",
            [table],
            [run for cell in table.cells.values() for _, run in cell.runs],
            [],
            {},
            [],
        )
    )
    for other in other_results(table):
        assert f'href="#p{other.protocol}"' in text
        assert f'id="p{other.protocol}"' in text


def test_a_table_without_others_says_nothing_of_them(tmp_path: Path) -> None:
    add_results(
        make_run(tmp_path / "a", "pretrain", [*DIGITS, "student=convnet_w2"]),
        {"convnet_w2": (50, 60, 90)},
    )
    runs, _ = read_runs([tmp_path], effective_options)
    table = compare("digits", runs, [], lambda run, name, like: name)
    assert other_results(table) == []
    assert "Other evaluations" not in markdown(table) + page(
        PageContent("A report", [table], runs, [], {}, [])
    )
