from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
from made_runs import DIGITS, DIGITS_IMAGES, IMAGENET_IMAGES, STUDENTS, add_results, make_run

from seed_exp.config.identity import effective_options
from seed_exp.reporting.comparison import Table, compare
from seed_exp.reporting.entries import PlannedJob
from seed_exp.reporting.published import Published
from seed_exp.reporting.runs import Result, Run, read_runs
from seed_exp.reporting.table_cells import Value
from seed_exp.tools.report import planned_jobs

PLAN = (
    f"distill {' '.join(DIGITS)} {STUDENTS} teacher=moco_v2_r50 "
    "objective.queue_size=128,512 seed=0,1"
)
IMAGENET = [
    "data=imagenet",
    "views=mocov2",
    "epochs=200",
    "batch_size=256",
    "student=resnet18",
    "teacher=moco_v2_r50",
]
STEPS = 400 * 44
"""Steps of the longest of these runs."""
THEIRS = [
    Published(
        "resnet18",
        "resnet50",
        "moco_v2",
        "seed",
        "linear_top1",
        "imagenet",
        57.6,
        "SEED",
        200,
        "mocov2",
    ),
    Published(
        "resnet18",
        "resnet50",
        "moco_v2",
        "seed",
        "linear_top1",
        "imagenet",
        60.0,
        "another",
        400,
        "swav_multicrop",
    ),
]


def options(queue_size: int, seed: int, student: str = STUDENTS) -> list[str]:
    return [
        *DIGITS,
        student,
        "teacher=moco_v2_r50",
        f"objective.queue_size={queue_size}",
        f"seed={seed}",
    ]


def table(folder: Path, plan: str | None = None, published: Sequence[Published] = ()) -> Table:
    runs, problems = read_runs([folder], effective_options)
    assert problems == []
    return compare("a table", runs, published, command, None if plan is None else jobs_of(plan))


@functools.cache
def jobs_of(plan: str) -> list[PlannedJob]:
    """Composed once for all tests."""
    return planned_jobs(plan)


def command(run: Run, evaluation: str, like: Result | None) -> str:
    return f"{evaluation} {run.folder.name}"


def ours(table: Table, row: str, column: int, measure: str = "T-1") -> Value:
    return table.cells[row, column].values[measure]


def test_what_differs_between_jobs_makes_columns_and_seeds_a_mean_with_its_spread(
    tmp_path: Path,
) -> None:
    top1 = {(128, 0): 50.0, (128, 1): 53.0, (512, 0): 60.0, (512, 1): 61.5}
    for (size, seed), value in top1.items():
        add_results(
            make_run(tmp_path / f"{size}-{seed}", "distill", options(size, seed)),
            {"convnet_w2": (value - 5, value, 99)},
        )
    for made in (table(tmp_path, PLAN), table(tmp_path)):
        assert made.rows == ["convnet_w2", "convnet_w32"]
        assert [column.label for column in made.columns] == [
            "objective.queue_size 128",
            "objective.queue_size 512",
        ]
        for number, size in enumerate((128, 512)):
            values = [top1[size, 0], top1[size, 1]]
            value = ours(made, "convnet_w2", number)
            assert value.mean == pytest.approx(sum(values) / 2)
            assert (
                value.std
                == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
                == statistics.stdev(values)
            )
            assert [source.seed for source in value.sources] == [0, 1]
        assert made.parameters == {"convnet_w2": 1626, "convnet_w32": 388_896}
        assert made.cells["convnet_w2", 0].state == ""
        assert (
            made.cells["convnet_w32", 0].state
            == "seed 0: no knn and no linear; seed 1: no knn and no linear"
        )
        assert made.cells["convnet_w32", 0].todo == (
            "knn 128-0",
            "linear 128-0",
            "knn 128-1",
            "linear 128-1",
        )


def test_averages_have_rows_of_their_own_beside_their_students(tmp_path: Path) -> None:
    averaged = [*options(128, 0), "ema_decay=0.99"]
    folder = make_run(tmp_path / "averaged", "distill", averaged)
    values = {"convnet_w2": 50.0, "convnet_w2_ema": 52.0, "convnet_w32": 60.0}
    add_results(folder, {name: (value - 5, value, 99) for name, value in values.items()})
    # With another decay it is another network, and the student is the same.
    other = make_run(
        tmp_path / "other", "distill", [*options(128, 1, "student=convnet_w2"), "ema_decay=0.9"]
    )
    add_results(other, {"convnet_w2": (46, 51, 99), "convnet_w2_ema": (47, 53, 99)})
    made = table(tmp_path)
    rows = ["convnet_w2", "convnet_w2 (EMA 0.99)", "convnet_w32", "convnet_w32 (EMA 0.99)"]
    assert made.rows == [*rows, "convnet_w2 (EMA 0.9)"]
    assert [column.label for column in made.columns] == ["all runs"]
    means = [ours(made, row, 0).mean for row in made.rows]
    assert means == [50.5, 52.0, 60.0, None, 53.0]
    assert made.parameters["convnet_w2 (EMA 0.99)"] == 1626
    assert made.cells["convnet_w32 (EMA 0.99)", 0].state == "no knn and no linear"
    assert made.cells["convnet_w2 (EMA 0.99)", 0].state == ""


def test_a_run_with_averages_fills_the_cells_of_one_without(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "distill", [*options(128, 0), "ema_decay=0.99"])
    add_results(folder, {"convnet_w2": (45, 50, 99), "convnet_w2_ema": (47, 52, 99)})
    made = table(tmp_path, PLAN)
    assert made.rows == ["convnet_w2", "convnet_w32"]
    assert ours(made, "convnet_w2", 0).mean == 50
    assert made.notes == []


def test_fine_tuning_with_few_labels_has_columns_where_there_is_any_and_is_never_missing(
    tmp_path: Path,
) -> None:
    runs = [make_run(tmp_path / f"{size}", "distill", options(size, 0)) for size in (128, 512)]
    for run in runs:
        add_results(run, {"convnet_w2": (1, 2, 3)})
    assert table(tmp_path).measures == ["K", "T-1", "T-5"]
    few = {
        "1 %": {"data.fraction": 0.01},
        "10 %": {"data.subset": "lists/10percent.txt", "data.fraction": 1.0},
    }
    for number, chosen in enumerate(few.values()):
        add_results(
            runs[0], {"convnet_w2": (0, 40 + number, 0)}, evaluations=["finetune"], **chosen
        )
    add_results(
        runs[0], {"convnet_w2": (0, 99, 0)}, evaluations=["finetune"], **{"data.fraction": 1.0}
    )
    made = table(tmp_path)
    assert made.measures == ["K", "T-1", "T-5", "1 %", "10 %"]
    assert [ours(made, "convnet_w2", 0, name).mean for name in few] == [40, 41]
    assert made.cells["convnet_w2", 1].todo == ()


def test_what_is_missing_is_said_with_the_command_that_fills_it(tmp_path: Path) -> None:
    make_run(tmp_path / "running", "distill", options(128, 0), step=30, finished=False)
    add_results(
        make_run(tmp_path / "done", "distill", options(512, 1)),
        {"convnet_w2": (1, 2, 3)},
        evaluations=["knn"],
    )
    made = table(tmp_path, PLAN)
    running, done = made.cells["convnet_w2", 0], made.cells["convnet_w2", 1]
    assert running.state == "seed 0: step 30/100; seed 1: not run"
    assert [line.split("seed_exp.")[1].split()[0] for line in running.todo] == [
        "distill",
        "distill",
    ]
    assert [f"seed={seed}" in line for seed, line in enumerate(running.todo)] == [True, True]
    assert all(
        "objective.queue_size=128" in line and "'student=[convnet_w2,convnet_w32]'" in line
        for line in running.todo
    )
    assert done.state == "seed 0: not run; seed 1: no linear"
    assert done.todo[-1] == "linear done"
    assert made.measures == ["K"]


def test_students_trained_alone_fill_the_cells_of_a_fleet(tmp_path: Path) -> None:
    add_results(
        make_run(tmp_path / "a", "distill", options(128, 0, "student=convnet_w32")),
        {"convnet_w32": (1, 2, 3)},
    )
    made = table(tmp_path, PLAN)
    assert [source.run.folder.name for source in ours(made, "convnet_w32", 0).sources] == ["a"]
    assert ours(made, "convnet_w2", 0).sources == ()


def test_a_run_with_other_options_fills_nothing_and_is_named_with_the_difference(
    tmp_path: Path,
) -> None:
    add_results(
        make_run(tmp_path / "a", "distill", [*options(128, 0), "steps=50"]),
        {"convnet_w2": (1, 2, 3)},
    )
    made = table(tmp_path, PLAN)
    assert all(not value.sources for cell in made.cells.values() for value in cell.values.values())
    assert made.notes == [
        f"{tmp_path}/a: {name} is not of this experiment: steps is 50, planned 100"
        for name in ("convnet_w2", "convnet_w32")
    ]


def test_options_without_effect_and_the_place_of_the_images_do_not_matter(tmp_path: Path) -> None:
    changed = [*options(128, 0), "data.root=elsewhere", "log_every=1", "run_dir=x", "eval_every=3"]
    add_results(make_run(tmp_path / "a", "distill", changed), {"convnet_w2": (1, 2, 3)})
    assert ours(table(tmp_path, PLAN), "convnet_w2", 0).mean == 2


def test_only_numbers_of_one_protocol_stand_in_a_table(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = make_run(tmp_path / f"{seed}", "distill", options(128, seed))
        add_results(run, {"convnet_w2": (10, 20 + seed, 30)}, seed=seed)
        if seed == 0:
            add_results(run, {"convnet_w2": (10, 99, 99)}, evaluations=["linear"], epochs=3)
    made = table(tmp_path, PLAN)
    assert [source.value for source in ours(made, "convnet_w2", 0).sources] == [20, 21]
    assert made.notes == ["linear: of 2 protocols the one of most runs is shown"]


def test_the_evaluation_of_the_latest_checkpoint_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", "distill", options(128, 0))
    for step, value in ((100, 50.0), (60, 70.0)):
        add_results(run, {"convnet_w2": (value, value, value)}, step=step)
    assert ours(table(tmp_path), "convnet_w2", 0).mean == 50


def test_the_same_run_twice_counts_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        add_results(
            make_run(tmp_path / name, "distill", options(128, 0)), {"convnet_w2": (1, 2, 3)}
        )
    made = table(tmp_path)
    assert [source.run.folder.name for source in ours(made, "convnet_w2", 0).sources] == ["a"]
    assert made.notes[0] == f"{tmp_path}/b: left out, convnet_w2 repeats {tmp_path}/a"


def test_runs_on_other_images_are_not_mixed(tmp_path: Path) -> None:
    other = ("digits:train:1437:0000000000000000", "digits:val:360:0000000000000000")
    for seed in (0, 1, 2):
        run = make_run(
            tmp_path / f"{seed}",
            "distill",
            options(128, seed),
            images=other if seed == 2 else DIGITS_IMAGES,
        )
        add_results(run, {"convnet_w2": (1, seed, 3)})
    planned, free = table(tmp_path, PLAN), table(tmp_path)
    assert [source.value for source in ours(planned, "convnet_w2", 0).sources] == [0, 1]
    assert "left out, trained on" in planned.notes[0]
    assert [column.label for column in free.columns] == [
        "images digits:train:1437 #9e39",
        "images digits:train:1437 #0000",
    ]


def test_a_teacher_of_our_own_is_known_by_how_it_was_made_not_by_its_folder(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(
            tmp_path / f"teacher{seed}",
            "pretrain",
            [*DIGITS, "student=convnet_w32", f"seed={seed}"],
        )
        for name, more in (("seed", []), ("wide", ["students.convnet_w2.hidden_dim=64"])):
            teacher = ["teacher=run", f"teacher.checkpoint={tmp_path}/teacher{seed}"]
            run = make_run(
                tmp_path / f"{name}{seed}",
                "distill",
                [*DIGITS, "student=convnet_w2", *teacher, *more, f"seed={seed}"],
            )
            add_results(run, {"convnet_w2": (1, 2 + seed, 3)})
    made = table(tmp_path)
    assert [column.label for column in made.columns] == [
        "no teacher (MoCo-V2)",
        "teacher convnet_w32 (ours)",
        "teacher convnet_w32 (ours), student.hidden_dim 64",
    ]
    assert [source.value for source in ours(made, "convnet_w2", 1).sources] == [2, 3]


@pytest.mark.parametrize("more", ["", "objective.effective_neighbours=9"])
def test_runs_of_an_automatic_queue_fill_the_cells_that_were_planned_for_it(
    tmp_path: Path, more: str
) -> None:
    line = [*DIGITS, STUDENTS, "teacher=moco_v2_r50", *more.split()]
    run = make_run(tmp_path / "a", "distill", line)
    add_results(run, {"convnet_w2": (1, 2, 3)})
    for plan in ("", " objective.queue_size=auto,128"):
        made = table(tmp_path, f"distill {' '.join(line)}{plan}")
        assert ours(made, "convnet_w2", 0).mean == 2
        assert not any("not of this experiment" in note for note in made.notes)
        labels = [column.label for column in made.columns]
        assert labels == (
            ["objective.queue_size 512", "objective.queue_size 128"] if plan else ["all runs"]
        )


def imagenet(
    folder: Path, *more: str, images: Sequence[str] = IMAGENET_IMAGES, **linear: object
) -> Value:
    run = make_run(folder, "distill", [*IMAGENET, *more], images=images, step=STEPS)
    add_results(run, {"resnet18": (40.0, 57.1, 81.0)}, images=images, step=STEPS, **linear)
    return ours(table(folder, published=THEIRS), "resnet18", 0)


def test_a_published_number_of_the_same_images_training_and_protocol_compares(
    tmp_path: Path,
) -> None:
    value = imagenet(tmp_path / "a")
    assert value.published == THEIRS[0]
    assert value.reasons == ()
    assert value.difference == pytest.approx(57.1 - 57.6)
    multicrop = imagenet(tmp_path / "b", "views=swav_multicrop", "epochs=400")
    assert (multicrop.published, multicrop.reasons) == (THEIRS[1], ())


@pytest.mark.parametrize(
    ("more", "images", "linear", "reason"),
    [
        (
            ["objective.queue_size=128"],
            IMAGENET_IMAGES,
            {},
            "objective.queue_size=128, published: 65536",
        ),
        (["epochs=100"], IMAGENET_IMAGES, {}, "100 epochs, published: 200"),
        (
            ["objective.effective_neighbours=9"],
            IMAGENET_IMAGES,
            {},
            "objective.effective_neighbours=9.0, published: None",
        ),
        (
            ["teacher.size=448"],
            IMAGENET_IMAGES,
            {},
            "the teacher sees global views at 448 pixels",
        ),
        (["steps=100"], IMAGENET_IMAGES, {}, "100 steps, not epochs"),
        (["views=simclr"], IMAGENET_IMAGES, {}, "views simclr, published: mocov2"),
        ([], DIGITS_IMAGES, {}, "trained on digits:train:1437, not on imagenet"),
        (
            [],
            ("tsv:train.tsv:126689:0123456789abcdef", IMAGENET_IMAGES[1]),
            {},
            "trained on tsv:train.tsv:126689, not on imagenet",
        ),
        (
            [],
            (IMAGENET_IMAGES[0], DIGITS_IMAGES[1]),
            {},
            "evaluated on tsv:train.tsv:1281167 and digits:val:360, not on imagenet",
        ),
        ([], IMAGENET_IMAGES, {"epochs": 30}, "linear evaluation with epochs=30, published: 100"),
    ],
)
def test_a_published_number_of_anything_else_is_a_reference_with_the_reason(
    tmp_path: Path, more: list[str], images: tuple[str, str], linear: dict[str, object], reason: str
) -> None:
    value = imagenet(tmp_path / "a", *more, images=images, **linear)
    assert value.published is not None
    assert value.difference is None
    assert reason in value.reasons
