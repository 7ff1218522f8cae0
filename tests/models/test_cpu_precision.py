"""On a CPU with bfloat16 units each network gets its format by a rule, without a clock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seed_exp.base.registry import lookup
from seed_exp.config.compose import compose
from seed_exp.config.schema import (
    CropConfig,
    DiscoConfig,
    L2Config,
    ObjectiveConfig,
    Precision,
    Reduce,
    SeedConfig,
    SeedGeneralConfig,
    TeacherConfig,
    ViewsConfig,
)
from seed_exp.models import cpu_precision
from seed_exp.models.cpu_precision import chosen_formats, in_words, precisions
from seed_exp.models.students import STUDENTS

CPU = torch.device("cpu")
HALF, SINGLE = Precision.bfloat16, Precision.float32
PRESETS = {
    **dict.fromkeys(["resnet10t", "resnet18", "resnet34", "resnet50"], HALF),
    **dict.fromkeys(["vit_tiny", "vit_small", "convnet_w2", "convnet_w32"], HALF),
    **dict.fromkeys(["efficientnet_b0", "efficientnet_b1", "mobilenetv3_large"], SINGLE),
    **dict.fromkeys(["convnext_atto", "efficientvit_b0", "fastvit_t8"], SINGLE),
    "mobilenetv4_small": SINGLE,
}


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU has them, whichever it is."""
    monkeypatch.setattr(cpu_precision, "has_bfloat16_units", lambda: True)


def views(*sizes: int) -> ViewsConfig:
    names = ("global", "local")
    crops = {
        name: CropConfig(size, 1, [0.5, 1.0]) for name, size in zip(names, sizes, strict=False)
    }
    return ViewsConfig(name="any", crops={**crops, "none": CropConfig(8, 0, [0.5, 1.0])})


def of_preset(name: str) -> nn.Module:
    config = compose("pretrain", ["data=digits", f"student={name}"]).students[name]
    with torch.device("meta"):
        return lookup(STUDENTS, config.network, "network")(config)


def chosen(
    precision: Precision = Precision.auto, device: torch.device = CPU, **options: Any
) -> dict[str, Precision]:
    options = {"objective": SeedConfig(), "teacher": TeacherConfig(network="resnet50"), **options}
    networks = {"dense": nn.Conv2d(4, 4, 3), "mobile": nn.Conv2d(4, 8, 3, groups=4)}
    of = options.pop("views", views(224, 96))
    return precisions(chosen_formats(precision, device, of, networks, **options))


def test_there_is_an_expectation_for_every_preset() -> None:
    files = Path(__file__).parents[2].glob("conf/student/*.yaml")
    assert {file.stem for file in files} - {"custom", "timm"} == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_students_are_trained_in_bfloat16_unless_they_have_depthwise_convolutions(
    name: str,
) -> None:
    of = chosen_formats(Precision.auto, CPU, views(224), {"a": of_preset(name)}, has_keys=True)
    assert precisions(of) == {"students.a": PRESETS[name], "keys.a": HALF}


def test_convolutions_of_grouped_channels_are_not_depthwise() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=4))
    of = chosen_formats(Precision.auto, CPU, views(224), {"a": network})
    assert precisions(of) == {"students.a": HALF}


def test_each_network_has_its_own_format() -> None:
    formats = chosen(has_keys=True)
    assert formats == {
        "teacher": HALF,
        "students.dense": HALF,
        "keys.dense": HALF,
        "students.mobile": SINGLE,
        "keys.mobile": HALF,
    }
    assert in_words(formats) == (
        "bfloat16: teacher, students.dense, keys.dense, keys.mobile; float32: students.mobile"
    )


@pytest.mark.parametrize(
    ("objective", "teacher", "expected"),
    [
        (SeedConfig(), {}, HALF),
        (SeedConfig(tau_teacher=0.009), {}, SINGLE),
        (SeedConfig(tau_teacher=1e-4), {}, SINGLE),
        (SeedConfig(effective_neighbours=10), {}, SINGLE),
        (SeedConfig(dense_weight=0.5), {}, SINGLE),
        (SeedGeneralConfig(), {}, SINGLE),
        (SeedGeneralConfig(effective_neighbours=None), {}, HALF),
        (L2Config(), {}, HALF),
        (DiscoConfig(), {}, HALF),
        (SeedConfig(), {"reduce": Reduce.whiten, "embedding_dim": 8}, SINGLE),
    ],
)
def test_a_teacher_keeps_float32_where_rounding_would_move_its_target(
    objective: ObjectiveConfig, teacher: dict[str, Any], expected: Precision
) -> None:
    options = TeacherConfig(network="resnet50", **teacher)
    assert chosen(objective=objective, teacher=options)["teacher"] is expected


def test_small_views_leave_every_network_in_float32() -> None:
    assert set(chosen(views=views(224, 63), has_keys=True).values()) == {SINGLE}
    assert chosen(views=views(224, 64))["teacher"] is HALF
    small_at_first = replace(views(224), resolution=[[0, 48], [5, 224]])
    assert set(chosen(views=small_at_first).values()) == {SINGLE}
    never_small = replace(views(32), resolution=[[0, 64]])
    assert chosen(views=never_small)["teacher"] is HALF


def test_nothing_is_chosen_with_another_precision_on_a_gpu_or_without_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen(Precision.float32) == chosen(Precision.bfloat16) == {}
    assert chosen(device=torch.device("cuda")) == {}
    monkeypatch.setattr(cpu_precision, "has_bfloat16_units", lambda: False)
    assert chosen() == {}
