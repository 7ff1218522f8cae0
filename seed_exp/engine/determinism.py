"""Whether the same operation gives the same bits each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic as memory


@contextmanager
def algorithms(*, deterministic: bool) -> Iterator[None]:
    """Context with algorithms that give the same bits each time, or with the fastest ones.

    Some operations add in the order in which a GPU's threads finish. With `deterministic`, cuDNN,
    torch and compiled code take other algorithms for them. An operation that has no other raises a
    RuntimeError that names it; no student that SEED released has one. Matrix products also need
    CUBLAS_WORKSPACE_CONFIG, which `distributed.local_device` sets. On a CPU nothing changes.
    """
    cudnn = torch.backends.cudnn
    fill: Any = memory  # a module whose options mypy does not see
    before = (
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        fill.fill_uninitialized_memory,
    )
    _use_deterministic_algorithms(deterministic)
    cudnn.deterministic = deterministic
    fill.fill_uninitialized_memory = False  # nothing here reads it, and to fill it takes time
    try:
        yield
    finally:
        _use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = before[1:]


def _use_deterministic_algorithms(use: bool) -> None:
    if torch.are_deterministic_algorithms_enabled() != use:  # the call imports the compiler
        torch.use_deterministic_algorithms(use)
