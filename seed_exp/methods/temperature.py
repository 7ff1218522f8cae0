"""The teacher's temperature at which its target has a given number of effective neighbours.

The effective neighbours of a view are exp(H) with H the entropy of its target, as `target_entropy`
has it: 1 if the target is one-hot. t-SNE calls the same number perplexity. It never falls when the
temperature rises, so bisection finds the temperature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seed_exp.config.schema import NeighboursPer, ObjectiveConfig, SeedConfig
from seed_exp.methods.losses import target_entropy

COLDEST, WARMEST = 1e-4, 100.0
"""Temperatures between which one is looked for."""
HALVINGS = 32
"""Steps of the bisection for a run, which leave no more than rounding."""
ROW_HALVINGS, ROW_WINDOW = 12, 8.0
"""Steps for a row, and the largest factor between its temperature and the run's: to 0.1 %."""


class Temperature(nn.Module):
    """The temperature that a run has found, a Python number that its checkpoints keep."""

    value: float | None = None
    """None until it is found."""

    def get_extra_state(self) -> float | None:
        """A Python number, so that nothing ever waits for the GPU to read it."""
        return self.value

    def set_extra_state(self, state: float | None) -> None:
        """Takes the temperature from a checkpoint."""
        self.value = state


def neighbours_of(objective: ObjectiveConfig) -> float | None:
    """The number of effective neighbours that is to choose the temperature; None = none is."""
    return objective.effective_neighbours if isinstance(objective, SeedConfig) else None


def calibrated_temperature(teacher: Tensor, queue: Tensor, neighbours: float) -> float:
    """The temperature with mean_i exp(H(softmax(t_i . [t_i; queue] / tau))) = `neighbours`.

    It has four digits: more would not be the same on another machine.

    Args:
        teacher: The teacher's embeddings t of views of images [N, D], unit length.
        queue: Its embeddings of views of other images [K, D], unit length.
        neighbours: Effective neighbours, the own embedding included.

    Raises:
        ValueError: no temperature gives so many or so few.
    """
    if not (teacher.isfinite().all() and queue.isfinite().all()):
        raise ValueError(
            f"objective.effective_neighbours={neighbours:g} finds no temperature, because the "
            "teacher gives embeddings that are not finite; check its weights, or take "
            "precision=float32"
        )

    def found(tau: float) -> float:
        return float(target_entropy(teacher, queue, tau_teacher=tau).exp().mean())

    fewest, most = found(COLDEST), found(WARMEST)
    if not fewest < neighbours < most:
        raise ValueError(
            f"objective.effective_neighbours={neighbours:g} cannot be reached: the target of this "
            f"teacher over a queue of {len(queue):,} has {fewest:.6g} at "
            f"tau_teacher={COLDEST:g} and {most:.6g} at {WARMEST:g}; {_remedy(fewest, most)}"
        )
    low, high = math.log(COLDEST), math.log(WARMEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if found(math.exp(middle)) < neighbours else (low, middle)
    return float(f"{math.exp(high):.4g}")


def _remedy(fewest: float, most: float) -> str:
    if fewest > 0.99 * most:
        return (
            "its embeddings of all images are equal, and there is nothing to learn from them: "
            "check its weights and the views, or choose another teacher"
        )
    return "choose a number in between, or another objective.queue_size"


@torch.no_grad()
def row_temperatures(teacher: Tensor, queue: Tensor, neighbours: float, around: float) -> Tensor:
    """A temperature for each row [N], at which it has so many effective neighbours by itself.

    `around` is the middle of the window in which it is looked for; a row that needs another one
    gets the window's end. A pass over the queue for each of `ROW_HALVINGS` steps.
    """
    middle = torch.full((len(teacher),), math.log(around), device=teacher.device)
    half = math.log(ROW_WINDOW)
    for _ in range(ROW_HALVINGS):
        half /= 2
        entropy = target_entropy(teacher, queue, tau_teacher=middle.exp())
        middle = torch.where(entropy < math.log(neighbours), middle + half, middle - half)
    return middle.exp()


def teacher_temperature(teacher: Tensor, queue: Tensor, config: SeedConfig) -> float | Tensor:
    """The run's temperature, or that of each row [N] if `config` asks for it."""
    neighbours, tau = config.effective_neighbours, config.tau_teacher
    if neighbours is None or config.effective_neighbours_per is NeighboursPer.run:
        return tau
    return row_temperatures(teacher, queue, neighbours, around=tau)
