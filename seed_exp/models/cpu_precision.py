"""Number formats of networks on CPUs that compute in bfloat16: a rule, decided without a clock.

A probe would be right more often. But two runs of the same command are to give the same numbers,
and a clock does not say the same twice. docs/performance.md has the measurements behind the rule.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from seed_exp.base.network_names import TEACHER, keys_of, trained
from seed_exp.config.schema import ObjectiveConfig, Precision, TeacherConfig, ViewsConfig

log = logging.getLogger("seed_exp")

SMALLEST_VIEW = 64
"""Side in pixels of the smallest views for which a network may leave float32."""
LOWEST_TEMPERATURE = 0.01
"""Temperature below which the rounding of a teacher in bfloat16 would move its target too far."""


class Choice(NamedTuple):
    """A network's number format."""

    precision: Precision
    """float32 or bfloat16."""
    reason: str
    """Why, for the log."""


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 itself (x86: avx512_bf16, which CPUs with AMX have too).

    Others only emulate it.
    """
    return torch.cpu._is_avx512_bf16_supported()


def chosen_formats(
    precision: Precision,
    device: torch.device,
    views: ViewsConfig,
    students: Mapping[str, nn.Module],
    *,
    teacher: TeacherConfig | None = None,
    objective: ObjectiveConfig | None = None,
    has_keys: bool = False,
) -> dict[str, Choice]:
    """Formats of a run's networks, by name, where `precision` leaves them to the CPU.

    Depends on the options, the networks' layers and what the CPU can do, not on its speed. Nothing
    on a GPU, with another precision than auto, or on a CPU without units for bfloat16.

    Args:
        precision: The option.
        device: Where they compute.
        views: Recipe of what they see.
        students: Trained networks, by name.
        teacher: Options of the frozen teacher; None = there is none.
        objective: Objective of the distillation; None = there is none.
        has_keys: Whether each student has a momentum encoder.
    """
    if precision is not Precision.auto or device.type != "cpu" or not has_bfloat16_units():
        return {}
    half, single = Precision.bfloat16, Precision.float32
    choices: dict[str, Choice] = {}
    if teacher is not None and objective is not None:
        obstacle = obstacle_of_teacher(teacher, objective)
        choices[TEACHER] = Choice(single, obstacle) if obstacle else Choice(half, "frozen")
    for name, student in students.items():
        choices[trained(name)] = (
            Choice(single, "depthwise convolutions are slower to train in bfloat16")
            if has_depthwise_convolutions(student)
            else Choice(half, "no depthwise convolutions")
        )
        if has_keys:
            choices[keys_of(name)] = Choice(half, "no backward pass")
    if (smallest := views.sizes[0]) < SMALLEST_VIEW:
        reason = f"it sees views of {smallest} pixels, less than {SMALLEST_VIEW}"
        return {name: Choice(single, reason) for name in choices}
    return choices


def precisions(choices: Mapping[str, Choice]) -> dict[str, Precision]:
    """The formats without their reasons."""
    return {name: choice.precision for name, choice in choices.items()}


def in_words(formats: Mapping[str, Precision]) -> str:
    """The networks of each format: "bfloat16: teacher; float32: students.a"; "" for none."""
    names: dict[str, list[str]] = {}
    for name, precision in formats.items():
        names.setdefault(precision.value, []).append(name)
    return "; ".join(f"{value}: {', '.join(names[value])}" for value in sorted(names))


def log_formats(kept: Mapping[str, Precision], choices: Mapping[str, Choice]) -> None:
    """Logs in which format each network computes.

    Args:
        kept: The networks in bfloat16, from the run's config.json.
        choices: What `chosen_formats` gives here, which is not what an earlier run has kept if that
            was begun elsewhere.
    """
    for name in {**choices, **kept}:
        precision = kept.get(name, Precision.float32)
        choice = choices.get(name)
        is_new = choice is not None and choice.precision is precision
        reason = choice.reason if choice and is_new else "as in this run so far"
        log.info("precision: %s computes in %s (%s)", name, precision.value, reason)
    if kept and not has_bfloat16_units():
        log.warning(
            "warning: this run computes networks in bfloat16, in which it was begun; this CPU only "
            "emulates that, which takes 2 to 10 times as long as on a CPU with avx512_bf16"
        )


def obstacle_of_teacher(teacher: TeacherConfig, objective: ObjectiveConfig) -> str | None:
    """Why a teacher's embeddings need float32 on a CPU; None if they do not."""
    if teacher.reduce is not None:
        return "its embeddings are projected, which may enlarge rounding"
    if getattr(objective, "dense_weight", 0) > 0:
        return "its maps are standardised, which may enlarge rounding"
    if getattr(objective, "effective_neighbours", None) is not None:
        return "its temperature is not known yet, and rounding would move a target of a low one"
    temperatures = [
        value
        for option in ("tau_teacher", "tau_student")
        if (value := getattr(objective, option, None)) is not None
    ]
    if (lowest := min(temperatures, default=LOWEST_TEMPERATURE)) < LOWEST_TEMPERATURE:
        return f"at a temperature of {lowest:g} rounding would move its target"
    return None


def has_depthwise_convolutions(network: nn.Module) -> bool:
    """Whether any convolution works on each channel by itself."""
    return any(
        isinstance(module, _ConvNd) and module.groups == module.in_channels > 1
        for module in network.modules()
    )
