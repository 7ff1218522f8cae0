"""Sizes of the global views over time: phases of a run, each with a size or several in turn.

A phase is [first, size, ...]: its first epoch, or step where the run is stated in steps, and the
sides in pixels of the global views from then on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

SMALLEST = 8
"""Smallest side in pixels of a phase."""

Phases = Sequence[Sequence[int]]


def size_at(phases: Phases, time: int) -> int:
    """Side in pixels in epoch (or step) `time`, from 0; the sizes of a phase take turns."""
    first, *sizes = next(phase for phase in reversed(phases) if phase[0] <= time)
    return sizes[(time - first) % len(sizes)]


def require_phases(phases: list[Any]) -> None:
    """Checks phases by themselves.

    Raises:
        ValueError: there is none; one is something else than [first, size, ...]; they do not begin
            one after another, the first at 0; or a size is too small.
    """
    if not phases:
        raise ValueError(
            "views.resolution=[] has no size; give [[0,SIZE],...], or null for views of one size"
        )
    if not all(map(_is_phase, phases)):
        raise ValueError(
            "views.resolution must be phases [first epoch, size, ...] of whole numbers, such as "
            f"[[0,112],[100,224]], got {phases}"
        )
    firsts = [phase[0] for phase in phases]
    if firsts[0] != 0 or any(one >= other for one, other in itertools.pairwise(firsts)):
        raise ValueError(
            "the phases of views.resolution must begin at 0 and one after another, "
            f"got {firsts} in {phases}"
        )
    smallest = min(size for phase in phases for size in phase[1:])
    if smallest < SMALLEST:
        raise ValueError(
            f"sizes of views.resolution must be at least {SMALLEST} pixels, got {smallest}"
        )


def require_within(phases: Phases, end: int, unit: str) -> None:
    """Checks that a run comes to every size of its phases.

    Args:
        phases: The phases.
        end: Length of the run.
        unit: What it is counted in, `epochs` or `steps`.

    Raises:
        ValueError: it does not.
    """
    last = phases[-1][0]
    if last >= end:
        hint = "" if unit == "epochs" else "; a run of steps=N counts in steps"
        raise ValueError(
            f"views.resolution begins a phase at {last}, but the run has {unit}={end}{hint}: "
            "let the phase begin earlier, or leave it out"
        )
    for phase, following in zip(phases, [*phases[1:], [end]], strict=True):
        length, num = following[0] - phase[0], len(phase) - 1
        if length < num:
            raise ValueError(
                f"the phase {list(phase)} of views.resolution has {length} {unit} for its {num} "
                f"sizes, which take turns: give it {num} {unit} or more, or fewer sizes"
            )


def _is_phase(phase: Any) -> bool:
    return (
        isinstance(phase, list)
        and len(phase) >= 2
        and all(isinstance(one, int) and not isinstance(one, bool) for one in phase)
    )
