"""The interface of a batch, and of the code that fills it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Batch(Protocol):
    """A named tuple of tensors with one row per image, and the epoch of these images."""

    @property
    def indices(self) -> Tensor: ...

    def map(self: B, function: Callable[[Tensor], Tensor]) -> B:
        """The batch with `function` applied to each of its tensors."""
        ...

    def _replace(self: B, *, epoch: int = ..., indices: Tensor = ...) -> B: ...


B = TypeVar("B", bound=Batch)


class HostHalf(Protocol[B]):
    """The host half of views: makes batches of images; picklable."""

    def empty(self, num: int) -> B:
        """A batch with room for `num` images; its contents are arbitrary."""
        ...

    def host(
        self,
        images: Sequence[Tensor],
        labels: NDArray[np.int64],
        epoch: int,
        indices: NDArray[np.int64],
        out: B,
    ) -> None:
        """Fills `out` from images, uint8 [3, H, W] of any sizes, and labels [N], -1 = no label."""
        ...
