"""Reasons in batch norm against comparing a run: its statistics may give the contrast's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLISHED_GROUP = 32
"""Images that batch norm normalised together in MoCo's trainings: a batch of 256 on 8 GPUs."""
OF_TEACHER = "teacher's "
"""Beginning of the names under which a report knows the options of a run's teacher."""


def group_reasons(command: str, options: Mapping[str, Any]) -> list[str]:
    """Why a run's groups of batch norm differ from the published ones; empty if they do not.

    A key that is normalised with the same images as its query shares their statistics. The contrast
    can then be solved without looking at the image (arXiv:1911.05722, Section 3.3). The number of
    processes is not recorded, so a run counts as leaking if it leaks in one process.

    Args:
        command: Command of the run.
        options: Options of the run, flattened; absent `bn_group_size` = null.
    """
    option = _option(command, options)
    if option is None:
        return []
    size, batch = options.get(option), options.get("batch_size")
    if size is None or (isinstance(batch, int) and batch // size < 2):
        return [
            f"batch norm leaks in one process ({option}={'null' if size is None else size}): "
            "a key shares the batch statistics of its query, "
            f"published: groups of {PUBLISHED_GROUP} images"
        ]
    return [] if size == PUBLISHED_GROUP else [f"{option}={size}, published: {PUBLISHED_GROUP}"]


def teacher_reasons(setting: Mapping[str, Any]) -> list[str]:
    """Reasons as of `group_reasons` in the run of a teacher of our own, and of that one's teacher.

    Args:
        setting: Options of the student's run. Those of the teacher's run have names that begin with
            OF_TEACHER; options that are null are absent.
    """
    of_teacher = {
        name.removeprefix(OF_TEACHER): value
        for name, value in setting.items()
        if name.startswith(OF_TEACHER)
    }
    if not of_teacher:
        return []
    reasons = group_reasons(str(of_teacher["command"]), of_teacher)
    return [f"{OF_TEACHER}{line}" for line in [*reasons, *teacher_reasons(of_teacher)]]


def _option(command: str, options: Mapping[str, Any]) -> str | None:
    """Name of the option with the size of a group; None for a run without a momentum encoder."""
    if command == "pretrain":
        return "moco.bn_group_size"
    return "objective.bn_group_size" if options.get("objective.name") == "disco" else None
