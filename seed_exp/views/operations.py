"""Operations on views that recipes name besides those of `photometric`; plug-ins bring them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from seed_exp.base.registry import Registry


@dataclass(frozen=True)
class Operation:
    """An operation on a batch of views, after blur and before normalisation."""

    apply: Callable[[Tensor, Tensor], Tensor]
    """A function of a module, so that it can be pickled: (views [M, 3, S, S] from 0 to 1,
    uniform numbers [M, num_draws] in [0, 1)) -> views of the same shape."""
    num_draws: int = 0
    """Uniform numbers for each view: the same in every run, however many processes draw them."""


VIEW_OPERATIONS: Registry[Operation] = Registry("VIEW_OPERATIONS", {})
"""Operations by the name that `views.operations` gives."""
