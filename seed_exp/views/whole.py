"""Images as they are, for methods that resize and flip them along with what is known of their pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.views.recipe import HostBatch, TrainViews


class WholeImages(TrainViews):
    """Each image in the upper left corner of a square; beyond it the pixels are arbitrary. Nothing is random. Picklable.

    Args:
        size: Side of the square in pixels, at least that of any image.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def empty(self, num: int) -> HostBatch:
        """Room for what `host` makes of `num` images; the contents are arbitrary."""
        return HostBatch.empty(num, {"global": (1, self.size)}, {})

    def host(
        self,
        images: Sequence[Tensor],
        labels: NDArray[np.int64],
        epoch: int,  # noqa: ARG002  (the loader calls every host half alike)
        indices: NDArray[np.int64],
        out: HostBatch,
    ) -> None:
        """Copies images (uint8 [3, H, W], any sizes) into `out`, views["global"] [N, 1, 3, S, S]; no draws."""
        for image, square in zip(images, out.views["global"][:, 0], strict=True):
            square[:, : image.shape[1], : image.shape[2]] = image
        out.labels.copy_(torch.from_numpy(labels))
        out.indices.copy_(torch.from_numpy(indices))

    def device(self, batch: HostBatch) -> dict[str, Tensor]:
        """Values from 0 to 1, not normalised: float32 {"global": [1, N, 3, S, S]}."""
        return {"global": batch.views["global"].transpose(0, 1).float() / 255}
