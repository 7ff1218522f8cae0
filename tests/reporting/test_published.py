from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from made_runs import IMAGENET_IMAGES, composed

from seed_exp.config.compose import config_home
from seed_exp.config.options import decisive_options, effective_options
from seed_exp.reporting.comparison import compare
from seed_exp.reporting.published import read_published, reasons_against
from seed_exp.reporting.runs import Result, Run, StudentFile
from seed_exp.reporting.table_cells import Value

PUBLISHED, _ = read_published(config_home() / "experiments" / "published.csv")
EPOCH = 5004
"""Steps of an epoch of ImageNet in batches of 256."""


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
) -> Value:
    """Linear top-1 of a finished run on ImageNet with the defaults.

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
    result = Result(Path("run/results/linear.json"), "linear", protocol, {name: {"top1": 57.1}}, {})
    run = Run(
        *(Path("run"), command, "0.1.0", options, {"data": IMAGENET_IMAGES[0]}, [name]),
        networks={name: StudentFile(epochs * EPOCH, 1)},
        metrics=[{"step": EPOCH, "epoch": 1.0}],
        results=[result],
    )
    (cell,) = compare("a table", [run], PUBLISHED, lambda run, evaluation, like: "").cells.values()
    return cell.values["T-1"]


@pytest.mark.parametrize(
    ("command", "overrides", "theirs"),
    [
        ("distill", (), 57.6),
        (
            "distill",
            ("student=efficientnet_b0", "teacher=swav_r50w2", "views=swav_multicrop", "epochs=800"),
            67.6,
        ),
        ("pretrain", (), 52.5),
        ("pretrain", ("student=mobilenetv3_large",), 36.3),
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
            {"students.resnet18.hidden_dim": 2048},
            "the student's head is 2048 wide, published: as its features",
        ),
        (
            {"students.resnet18.deep_head": True},
            "the student's head is deep, published: two layers",
        ),
        ({"teacher.reduce": "whiten"}, "the teacher's embeddings are reduced by whiten"),
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


def test_a_head_of_the_width_of_the_features_is_the_published_one_however_it_is_written() -> None:
    assert value({"students.resnet18.hidden_dim": 512}).reasons == ()


def test_of_a_paper_whose_training_is_not_known_only_that_is_said() -> None:
    ours = value(
        {"students.resnet18.hidden_dim": 2048, "optimizer.name": "lars"},
        {"epochs": 30},
        overrides=("objective=bingo",),
    )
    assert ours.published is not None
    assert (ours.published.value, ours.difference) == (61.4, None)
    assert ours.reasons == ("how the paper of bingo trained is not known here",)


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
