from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import DIGITS, add_results, make_run

from seed_exp.config.compose import config_home
from seed_exp.config.identity import effective_options
from seed_exp.reporting.columns import TableColumn
from seed_exp.reporting.comparison import Table, compare
from seed_exp.reporting.page.build import page
from seed_exp.reporting.page.content import PageContent
from seed_exp.reporting.published import Published, read_published
from seed_exp.reporting.runs import Result, Run, read_runs
from seed_exp.reporting.table_cells import Provenance, TableCell, Value
from seed_exp.reporting.table_formats import (
    CSV_HEADER,
    comma_separated,
    latex,
    markdown,
    missing_commands,
)


def value(
    *ours: float,
    published: float | None = None,
    reasons: tuple[str, ...] = (),
    lrs: tuple[float, ...] = (30.0,),
) -> Value:
    run = Run(Path("runs/a"), "distill", "0.1.0", {"seed": 0}, {}, ["a"])
    result = Result(Path("r.json"), "linear", {"options": {"lrs": list(lrs)}}, {}, {})
    sources = tuple(Provenance(run, result, {}, number) for number in ours)
    theirs = (
        None
        if published is None
        else Published(
            "a", "", "", "moco_v2", "linear_top1", "imagenet", published, "a paper", 200, ""
        )
    )
    return Value(sources, theirs, reasons)


@pytest.fixture
def table() -> Table:
    """One cell of each kind, and names that mean something in each format."""
    cells = {
        ("a_b", 0): TableCell({"T-1": value(57.0, 58.0, published=57.6)}),
        ("a_b", 1): TableCell(
            {"T-1": value(90.0, published=62.35, reasons=("trained on digits",))}
        ),
        ("<b>|&", 0): TableCell(
            {"T-1": value(published=30)}, "not run", ("python -m seed_exp.distill x=<1>",)
        ),
    }
    columns = [TableColumn("lr 50%", {}), TableColumn("teacher $x$", {})]
    return Table(
        "A table",
        ["a_b", "<b>|&"],
        {"a_b": 1234567, "<b>|&": None},
        columns,
        cells,
        ["T-1"],
        ["a note"],
    )


def test_markdown_shows_ours_published_difference_reference_and_what_is_missing(
    table: Table,
) -> None:
    text = markdown(table)
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    assert rows[0] == ["student", "parameters", "A T-1", "B T-1"]
    assert rows[2] == ["a_b", "1,234,567", "57.5 ± 0.7, n=2 (57.6, -0.1)", "90.0 [62.35]"]
    assert rows[3] == ["&lt;b>\\|&", "", "not run; – (30.0)", ""]
    assert "- B: teacher $x$" in text
    assert "it does not compare with ours (trained on digits)" in text
    assert "python -m seed_exp.distill x=&lt;1>  # &lt;b>|&; lr 50%: not run" in text
    assert "- a note" in text


def test_latex_has_the_same_cells_and_nothing_that_tex_would_take_for_code(table: Table) -> None:
    lines = latex(table).splitlines()
    assert lines[1] == r"\begin{tabular}{lrrr}"
    assert r" &  & \multicolumn{1}{c}{lr 50\%} & \multicolumn{1}{c}{teacher \$x\$} \\" in lines
    assert r"a\_b & 1,234,567 & 57.5\,{\scriptsize$\pm$0.7} & 90.0 \\" in lines
    assert r"\quad published &  & 57.6 ($-0.1$) & \textcolor{gray}{62.35} \\" in lines
    assert r"<b>|\& &  & -- & -- \\" in lines
    body = [line for line in lines if line.endswith(r"\\")]
    assert {line.replace(r"\&", "").count("&") for line in body} == {3}


def test_csv_has_a_line_for_every_cell_and_measure(table: Table) -> None:
    rows = list(csv.DictReader(io.StringIO(comma_separated([table]))))
    assert tuple(rows[0]) == CSV_HEADER
    assert [(row["student"], row["setting"], row["ours"], row["difference"]) for row in rows] == [
        ("a_b", "lr 50%", "57.5", "-0.1"),
        ("a_b", "teacher $x$", "90.0", ""),
        ("<b>|&", "lr 50%", "", ""),
    ]
    assert (rows[1]["does_not_compare"], rows[2]["state"], rows[0]["n"], rows[0]["seeds"]) == (
        "trained on digits",
        "not run",
        "2",
        "0 0",
    )


def test_a_difference_of_the_best_of_several_learning_rates_is_marked_in_every_format(
    table: Table,
) -> None:
    assert "†" not in markdown(table)
    cell = TableCell({"T-1": value(58.0, published=57.6, lrs=(3, 30))})
    chosen = Table("t", ["a"], {"a": 1}, [TableColumn("b", {})], {("a", 0): cell}, ["T-1"])
    assert "58.0 (57.6, +0.4†)" in markdown(chosen)
    assert "- †: ours is the best of several learning rates" in markdown(chosen)
    assert r"57.6 ($+0.4^\dagger$)" in latex(chosen)
    assert [row["best_of"] for row in csv.DictReader(io.StringIO(comma_separated([chosen])))] == [
        "2"
    ]


def test_a_command_that_fills_several_cells_stands_once(table: Table) -> None:
    cells = {
        ("a_b", 0): TableCell({}, "not run", ("x",)),
        ("<b>|&", 0): TableCell({}, "not run", ("x",)),
    }
    fleet = Table("t", table.rows, table.parameters, table.columns, cells, [])
    assert missing_commands(fleet) == {"x": "a_b, <b>|&; lr 50%: not run"}


REFERENCES = [
    Published("a_b", "", "", "sslight", "linear_top1", "imagenet", 65.7, "SSLight & co", None, ""),
    Published("a_b", "t", "dinov2", "smd", "linear_top1", "imagenet", 59.6, "SMD", 300, ""),
]


def test_published_numbers_of_other_methods_stand_below_the_table_in_every_format(
    table: Table,
) -> None:
    below = replace(table, references=REFERENCES)
    rows = [" ".join(line.split()) for line in markdown(below).splitlines()]
    assert "Published by other methods, for reference:" in rows
    assert "| a_b | sslight without a teacher | imagenet | T-1 65.7 | SSLight & co |" in rows
    assert "| a_b | smd from t (dinov2), 300 epochs | imagenet | T-1 59.6 | SMD |" in rows
    grey = r"\multicolumn{4}{l}{\textcolor{gray}{"
    assert rf"{grey}a\_b, sslight without a teacher: T-1 65.7 (imagenet)}}}} \\" in latex(below)
    line = list(csv.DictReader(io.StringIO(comma_separated([below]))))[3]
    assert (line["student"], line["setting"], line["measure"], line["ours"]) == (
        "a_b",
        "sslight without a teacher",
        "T-1",
        "",
    )
    assert (line["published"], line["difference"], line["published_source"]) == (
        "65.7",
        "",
        "SSLight & co",
    )
    assert line["does_not_compare"] == "published by another method"
    html = page(PageContent("A report", [below], [], [], {}, []))
    assert "sslight without a teacher" in html
    assert "SSLight &amp; co" in html
    for text in (markdown(table), latex(table), page(PageContent("r", [table], [], [], {}, []))):
        assert "by other methods" not in text
        assert "sslight" not in text


def test_a_table_of_nothing_is_still_one_in_every_format() -> None:
    nothing = compare("nothing", [], [], lambda run, name, like: "")
    assert "student" in markdown(nothing)
    assert r"\end{tabular}" in latex(nothing)
    assert comma_separated([nothing]).count("\n") == 1


def test_the_published_numbers_of_the_repository_can_be_read() -> None:
    rows, problems = read_published(config_home() / "experiments" / "published.csv")
    assert problems == []
    (mine,) = [
        row
        for row in rows
        if (row.student, row.teacher, row.objective, row.protocol)
        == ("resnet18", "resnet152", "seed", "linear_top1")
    ]
    assert (mine.value, mine.dataset, mine.epochs) == (59.5, "imagenet", 200)


def test_rows_without_a_number_are_left_out_and_broken_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    head = "student,teacher,teacher_ssl,objective,epochs,views,hidden_dim,protocol,dataset,value"
    lines = [f"a,,,moco_v2,,,,knn,imagenet,{value},S" for value in ("", "many", "3")]
    path.write_text("\n".join([f"{head},source", *lines, ""]))
    rows, problems = read_published(path)
    assert [(row.value, row.epochs, row.hidden_dim) for row in rows] == [(3, None, None)]
    assert problems == [f"{path}, line 3: could not convert string to float: 'many'"]


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("b", "a"):
        run = make_run(
            tmp_path / name, "pretrain", [*DIGITS, "student=convnet_w2", f"seed={'ab'.index(name)}"]
        )
        add_results(run, {"convnet_w2": (1, 2, 3)})
    texts = []
    for _ in range(2):
        runs, _ = read_runs([tmp_path], effective_options)
        made = compare("t", runs, [], lambda run, name, like: f"{name} {run.folder}")
        texts.append(markdown(made) + latex(made) + comma_separated([made]))
    assert texts[0] == texts[1]
