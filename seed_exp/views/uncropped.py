"""Whole images, for methods that resize and flip them together with their pixel annotations."""

from __future__ import annotations

from torch import Tensor

from seed_exp.views.recipe import HostBatch, StillViews


class WholeImages(StillViews):
    """Each image in the upper left corner of a square; the other pixels are arbitrary. Picklable.

    Args:
        size: Side of the square in pixels, at least that of any image.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def place(self, image: Tensor, square: Tensor) -> None:
        """Copies the image."""
        square[:, : image.shape[1], : image.shape[2]] = image

    def device(self, batch: HostBatch) -> dict[str, Tensor]:
        """Values from 0 to 1, not normalised: float32 {"global": [1, N, 3, S, S]}."""
        return {"global": batch.views["global"].transpose(0, 1).float() / 255}
