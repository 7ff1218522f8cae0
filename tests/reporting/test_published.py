from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from made_runs import IMAGENET_IMAGES, add_results, composed, make_run

from seed_exp.config.compose import config_home
from seed_exp.config.identity import effective_options
from seed_exp.config.options import decisive_options
from seed_exp.reporting.comparison import compare
from seed_exp.reporting.published import read_published, reasons_against, references
from seed_exp.reporting.runs import Result, Run, StudentFile, read_runs
from seed_exp.reporting.table_cells import Value

PUBLISHED, _ = read_published(config_home() / "experiments" / "published.csv")
EPOCH = 5004
"""Steps of an epoch of ImageNet in batches of 256."""
IMAGENET = ("data=imagenet", "views=mocov2", "epochs=200", "batch_size=256")


@functools.cache
def composed_options(command: str, *overrides: str) -> dict[str, Any]:
    return effective_options(command, composed(command, overrides))


@functools.cache
def linear_options() -> dict[str, Any]:
    """Decisive options of `linear` as typed, but with the paper's learning rate alone."""
    return {**decisive_options(composed("linear", ("run=.",))), "lrs": [30.0]}


def value(
    changed: dict[str, Any],
    linear: dict[str, Any] | None = None,
    command: str = "distill",
    overrides: tuple[str, ...] = (),
    measure: str = "T-1",
) -> Value:
    """Linear accuracy of a finished run on ImageNet with the defaults.

    The arguments change options of its training and evaluation.
    """
    options = {**composed_options(command, *overrides), **changed}
    (name,) = {key.split(".")[1] for key in options if key.startswith("students.")}
    epochs = options[f"students.{name}.epochs"] or options["epochs"]
    protocol = {
        "options": {**linear_options(), **(linear or {})},
        **dict(zip(("train", "val"), IMAGENET_IMAGES, strict=True)),
        "students": {name: {"step": epochs * EPOCH}},
    }
    accuracy = {name: {"top1": 57.1, "top5": 81.0}}
    result = Result(Path("run/results/linear.json"), "linear", protocol, accuracy, {})
    run = Run(
        *(Path("run"), command, "0.1.0", options, {"data": IMAGENET_IMAGES[0]}, [name]),
        networks={name: StudentFile(epochs * EPOCH, 1)},
        metrics=[{"step": EPOCH, "epoch": 1.0}],
        results=[result],
    )
    (cell,) = compare("a table", [run], PUBLISHED, lambda run, evaluation, like: "").cells.values()
    return cell.values[measure]


@pytest.mark.parametrize(
    ("command", "overrides", "theirs"),
    [
        ("distill", (), 57.6),
        (
            "distill",
            ("student=efficientnet_b0", "teacher=swav_r50w2", "views=swav_multicrop", "epochs=800"),
            67.6,
        ),
        ("distill", ("students.resnet18.hidden_dim=2048",), 60.32),
        ("distill", ("objective=seed_strong",), 61.27),
        ("pretrain", (), 52.5),
        ("pretrain", ("student=mobilenetv3_large",), 36.3),
        ("pretrain", ("student=resnet50",), 67.4),
    ],
)
def test_our_recipes_are_those_of_the_papers(
    command: str, overrides: tuple[str, ...], theirs: float
) -> None:
    ours = value({}, command=command, overrides=overrides)
    assert ours.published is not None
    assert ours.reasons == ()
    assert ours.published.value == theirs
    assert ours.difference == pytest.approx(57.1 - theirs)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"students.resnet18.epochs": 50}, "50 epochs, published: 200"),
        ({"students.resnet18.init": "seed.pth.tar"}, "the student started from seed.pth.tar"),
        (
            {"students.resnet18.hidden_dim": 4096},
            "the student's head is 4096 wide, published: 512",
        ),
        (
            {"students.resnet18.deep_head": True},
            "the student's head is deep, published: two layers",
        ),
        ({"students.resnet18.hidden_dim": 0}, "the student's head is 0 wide, published: 512"),
        ({"teacher.reduce": "whiten"}, "the teacher's embeddings are reduced by whiten"),
        ({"objective.dense_weight": 0.5}, "maps are compared too, with weight 0.5"),
        (
            {"teacher.embedding": "features"},
            "the students learn the teacher's features, published: its head's output",
        ),
        ({"teacher.network": "moco_v2_r50_800ep"}, "a teacher of 800 epochs, published: 200"),
        ({"teacher.network": "resnet50"}, "a teacher of unknown epochs, published: 200"),
        ({"optimizer.name": "lars"}, "optimizer.name=lars, published: sgd"),
        ({"optimizer.weight_decay": 1e-3}, "optimizer.weight_decay=0.001, published: 0.0001"),
        ({"optimizer.schedule": "constant"}, "optimizer.schedule=constant, published: cosine"),
        ({"optimizer.clip_grad_norm": 1.0}, "optimizer.clip_grad_norm=1.0, published: None"),
        ({"objective.tau_teacher": 0.1}, "objective.tau_teacher=0.1, published: 0.01 or 0.0001"),
        ({"views.crops.global.size": 96}, "views.crops.global.size=96, published: 224"),
        ({"views.crops.global.num": 2}, "views.crops.global.num=2, published: 1"),
        ({"views.blur_prob": 0.0}, "views.blur_prob=0.0, published: 0.5"),
    ],
)
def test_another_training_than_the_paper_s_does_not_compare(
    changed: dict[str, Any], reason: str
) -> None:
    ours = value(changed)
    assert ours.published is not None
    assert (ours.difference, ours.reasons) == (None, (reason,))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"views.name": "linear_small"}, "views.name=linear_small, published: linear"),
        ({"views.crops.global.size": 32}, "views.crops.global.size=32, published: 224"),
        ({"optimizer.name": "lars"}, "optimizer.name=lars, published: sgd"),
        ({"optimizer.weight_decay": 1e-4}, "optimizer.weight_decay=0.0001, published: 0"),
        ({"optimizer.gamma": 0.2}, "optimizer.gamma=0.2, published: 0.1"),
        ({"optimizer.schedule": "cosine"}, "optimizer.schedule=cosine, published: step"),
        ({"lrs": [0.3, 3.0]}, "learning rates 0.3, 3, published: 30"),
    ],
)
def test_another_linear_evaluation_than_the_paper_s_does_not_compare(
    changed: dict[str, Any], reason: str
) -> None:
    ours = value({}, changed)
    assert (ours.difference, ours.reasons) == (None, (f"linear evaluation with {reason}",))


def test_a_student_that_has_fewer_epochs_than_its_run_compares_by_its_own() -> None:
    ours = value({"epochs": 400, "students.resnet18.epochs": 200})
    assert (ours.reasons, ours.difference) == ((), pytest.approx(57.1 - 57.6))


@pytest.mark.parametrize(
    ("objective", "width", "top1", "top5"),
    [
        ("seed", 512, 57.6, 81.8),
        ("seed", 2048, 60.32, 83.50),
        ("seed_strong", 2048, 61.27, 84.06),
    ],
)
def test_a_student_stands_beside_the_number_of_its_head_and_its_views(
    objective: str, width: int, top1: float, top5: float
) -> None:
    changed = {"students.resnet18.hidden_dim": width}
    for measure, theirs in (("T-1", top1), ("T-5", top5)):
        ours = value(changed, overrides=(f"objective={objective}",), measure=measure)
        assert ours.published is not None
        assert (ours.published.value, ours.reasons) == (theirs, ())


def test_a_wide_head_stands_beside_its_number_however_it_was_trained() -> None:
    ours = value({"students.resnet18.hidden_dim": 2048, "epochs": 100, "views.name": "swav"})
    assert ours.published is not None
    assert ours.published.value == 60.32
    assert ours.reasons == ("100 epochs, published: 200", "views swav, published: mocov2")


@pytest.mark.parametrize(
    ("changed", "overrides", "theirs", "reason"),
    [
        (
            {"students.resnet34.hidden_dim": 2048},
            ("student=resnet34",),
            58.5,
            "the student's head is 2048 wide, published: 512",
        ),
        (
            {"students.resnet18.hidden_dim": 512},
            ("objective=seed_strong",),
            61.27,
            "the student's head is 512 wide, published: 2048",
        ),
        (
            {"views.crops.global.num": 1},
            ("objective=seed_strong",),
            61.27,
            "views.crops.global.num=1, published: 2",
        ),
    ],
)
def test_another_head_or_number_of_views_is_a_reason(
    changed: dict[str, Any], overrides: tuple[str, ...], theirs: float, reason: str
) -> None:
    ours = value(changed, overrides=overrides)
    assert ours.published is not None
    assert (ours.published.value, ours.difference, ours.reasons) == (theirs, None, (reason,))


# Batch norm: a key that is normalised with its query gives itself away.

SHARED = "a key shares the batch statistics of its query, published: groups of 32 images"


@pytest.mark.parametrize(("student", "theirs"), [("resnet18", 52.5), ("resnet50", 67.4)])
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (None, f"batch norm leaks in one process (moco.bn_group_size=null): {SHARED}"),
        (129, f"batch norm leaks in one process (moco.bn_group_size=129): {SHARED}"),
        (128, "moco.bn_group_size=128, published: 32"),
        (2, "moco.bn_group_size=2, published: 32"),
    ],
)
def test_a_run_of_moco_with_other_groups_of_batch_norm_does_not_compare(
    student: str, theirs: float, size: int | None, reason: str
) -> None:
    ours = value(
        {"moco.bn_group_size": size}, command="pretrain", overrides=(f"student={student}",)
    )
    assert ours.published is not None
    assert (ours.published.value, ours.difference, ours.reasons) == (theirs, None, (reason,))


def test_a_run_from_before_there_were_groups_of_batch_norm_does_not_compare() -> None:
    nested = composed("pretrain", ())
    moco = {key: size for key, size in nested["moco"].items() if key != "bn_group_size"}
    old = effective_options("pretrain", {**nested, "moco": moco})
    ours = value({key: old.get(key) for key in old if key.startswith("moco.")}, command="pretrain")
    assert ours.reasons == (f"batch norm leaks in one process (moco.bn_group_size=null): {SHARED}",)


def test_a_run_of_disco_with_other_groups_of_batch_norm_says_so() -> None:
    unknown = "how the paper of disco trained is not known here"
    leak = f"batch norm leaks in one process (objective.bn_group_size=null): {SHARED}"
    disco = ("objective=disco",)
    assert value({}, overrides=disco).reasons == (unknown,)
    assert value({"objective.bn_group_size": None}, overrides=disco).reasons == (leak, unknown)
    assert value({}).reasons == ()  # SEED has no keys of its own


@pytest.mark.parametrize(("size", "leaks"), [("null", True), ("32", False)])
def test_a_student_of_a_teacher_whose_batch_norm_leaked_says_so(
    tmp_path: Path, size: str, leaks: bool
) -> None:
    trained = [*IMAGENET, "student=resnet50", f"moco.bn_group_size={size}"]
    make_run(tmp_path / "teacher", "pretrain", trained)
    options = [*IMAGENET, "student=resnet18", "teacher=run", "teacher_ssl=moco_v2"]
    run = make_run(
        tmp_path / "student", "distill", [*options, f"teacher.checkpoint={tmp_path}/teacher"]
    )
    add_results(run, {"resnet18": (40.0, 57.1, 81.0)}, images=IMAGENET_IMAGES)
    runs, _ = read_runs([tmp_path], effective_options)
    made = compare("a table", runs, PUBLISHED, lambda run, evaluation, like: "")
    (ours,) = [cell.values["T-1"] for (row, _), cell in made.cells.items() if row == "resnet18"]
    assert ours.published is not None
    assert (ours.published.value, ours.difference) == (57.6, None)
    assert "the teacher is our own resnet50" in ours.reasons
    leak = f"teacher's batch norm leaks in one process (moco.bn_group_size=null): {SHARED}"
    assert (leak in ours.reasons) == leaks


# Published numbers that no run of ours repeats.


def published(student: str, objective: str, **facts: Any) -> dict[str, float]:
    """Protocol -> value of the rows of a student by a method."""
    return {
        row.protocol: row.value
        for row in PUBLISHED
        if (row.student, row.objective) == (student, objective)
        and all(getattr(row, name) == fact for name, fact in facts.items())
    }


def test_the_numbers_of_the_reproduction_and_of_the_field_are_there() -> None:
    reproduced = {"teacher": "resnet50", "teacher_ssl": "moco_v2", "epochs": 200}
    for objective, width, top1, top5 in (
        ("seed", 512, 58.03, 82.44),
        ("seed", 2048, 60.32, 83.50),
        ("seed_strong", 2048, 61.27, 84.06),
    ):
        found = published("resnet18", objective, hidden_dim=width, **reproduced)
        assert found == {"linear_top1": top1, "linear_top5": top5}
    for student, sslight, dino in (
        ("resnet18", 65.7, 62.2),
        ("resnet34", 69.7, 67.7),
        ("mobilenetv2", 68.3, 66.2),
        ("vit_tiny", 69.5, 66.7),
    ):
        assert published(student, "sslight", teacher="") == {"linear_top1": sslight}
        assert published(student, "dino", teacher="") == {"linear_top1": dino}
    assert published("vit_small", "dinov2") == {"knn": 79.0, "linear_top1": 81.1}
    assert published("vit_tiny", "eupe") == {"knn": 66.3}
    assert published("vit_small", "eupe") == {"knn": 78.2}
    assert published("vit_tiny", "proteus") == {"linear_top1": 75.2}
    assert published("vit_small", "proteus") == {"linear_top1": 81.8}
    assert published("resnet18", "coss", teacher_ssl="moco_v3") == {"linear_top1": 67.2}


def test_references_are_of_the_networks_of_a_table_and_by_methods_that_are_not_here() -> None:
    found = {(row.student, row.objective) for row in references(PUBLISHED, ["resnet18"])}
    assert found == {("resnet18", "sslight"), ("resnet18", "dino"), ("resnet18", "smd")}
    tiny = references(PUBLISHED, ["vit_tiny_patch16_224", "resnet18d"])
    assert {row.student for row in tiny} == {"vit_tiny"}
    assert {row.objective for row in tiny} == {"sslight", "dino", "eupe", "proteus"}


def test_a_head_of_the_width_of_the_features_is_the_published_one_however_it_is_written() -> None:
    assert value({"students.resnet18.hidden_dim": 512}).reasons == ()


def test_of_a_paper_whose_training_is_not_known_only_that_is_said() -> None:
    ours = value(
        {"students.resnet18.hidden_dim": 2048, "optimizer.name": "lars"},
        {"epochs": 30},
        overrides=("objective=bingo_bags",),
    )
    assert ours.published is not None
    assert (ours.published.value, ours.difference) == (61.4, None)
    assert ours.reasons == ("how the paper of bingo_bags trained is not known here",)


def test_the_best_of_several_learning_rates_compares_and_is_said_to_be_that() -> None:
    one, several = value({}), value({}, {"lrs": [3.0, 30.0]})
    assert one.difference == several.difference == pytest.approx(57.1 - 57.6)
    assert (one.best_of, several.best_of) == (1, 2)


def test_fine_tuning_with_few_labels_compares_if_its_views_are_those_of_linear_evaluation() -> None:
    row = next(
        row
        for row in PUBLISHED
        if (row.student, row.teacher, row.protocol) == ("resnet18", "resnet50", "semi_1pct")
    )
    run = Run(
        Path("run"),
        "distill",
        "0.1.0",
        composed_options("distill"),
        {"data": IMAGENET_IMAGES[0]},
        ["resnet18"],
    )
    options = decisive_options(composed("finetune", ("run=.", "data.fraction=0.01")))
    for changed, reasons in (
        ({}, []),
        ({"views.flip_prob": 0.0}, ["fine-tuning with views.flip_prob=0.0, published: 0.5"]),
    ):
        few = f"{IMAGENET_IMAGES[0]}[12811:0123456789abcdef]"
        protocol = {"options": {**options, **changed}, "train": few, "val": IMAGENET_IMAGES[1]}
        assert (
            reasons_against(
                row, run, "resnet18", Result(Path("r.json"), "semi_1pct", protocol, {}, {})
            )
            == reasons
        )
