"""Views of images with masks: both halves treat a mask as they treat its image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.config.schema import IGNORED, ViewsConfig
from seed_exp.views.crops import crop_resize
from seed_exp.views.draws import uniforms
from seed_exp.views.photometric import (
    NUM_PHOTOMETRIC_DRAWS,
    Column,
    draw_parameters,
    normalize,
    photometric,
)
from seed_exp.views.recipe import HostBatch, SquareViews, StillViews

_NUM_DRAWS = 3


class MaskedCrops(SquareViews):
    """Random crops of images with masks, each a pure function of (seed, epoch, image). Picklable.

    An image is resized until its shorter side is a random multiple of the crop's, and cut at a
    random place; where it is smaller than the crop, the rest is grey and ignored. Then come flip
    and colours as in every recipe of views.

    Args:
        config: Recipe of flip, colours and normalisation.
        size: Side of a crop in pixels.
        scales: Smallest and largest multiple.
        seed: Seed of the draws.
    """

    def __init__(self, config: ViewsConfig, size: int, scales: Sequence[float], seed: int) -> None:
        self.config, self.size, self.scales, self.seed = config, size, scales, seed
        self._grey = (255 * torch.tensor(config.mean)).round().to(torch.uint8)[:, None, None]

    def empty(self, num: int) -> HostBatch:
        """A batch into which `host` can write `num` images and masks; its contents are arbitrary.

        The masks are the resolution `mask` of the views: uint8 [N, 1, 1, S, S].
        """
        batch = HostBatch.empty(num, {"global": (1, self.size)}, {"global": len(Column)})
        masks = torch.empty(num, 1, 1, self.size, self.size, dtype=torch.uint8)
        return batch._replace(views={**batch.views, "mask": masks})

    def host(
        self,
        images: Sequence[Tensor],
        labels: NDArray[np.int64],
        epoch: int,
        indices: NDArray[np.int64],
        out: HostBatch,
    ) -> None:
        """Fills `out` from images whose fourth channel is their mask, uint8 [4, H, W]."""
        draws = uniforms(self.seed, epoch, indices, 0, _NUM_DRAWS + NUM_PHOTOMETRIC_DRAWS)
        for image, row, pixels, mask in zip(
            images,
            draws[:, :_NUM_DRAWS].tolist(),
            out.views["global"][:, 0],
            out.views["mask"][:, 0, 0],
            strict=True,
        ):
            self._cut(image, row, pixels, mask)
        parameters = draw_parameters(draws[:, _NUM_DRAWS:], self.config)
        out.draws["global"].copy_(parameters[:, None])
        out.labels.copy_(torch.from_numpy(labels))
        out.indices.copy_(torch.from_numpy(indices))

    def _cut(self, image: Tensor, draws: Sequence[float], pixels: Tensor, mask: Tensor) -> None:
        low, high = self.scales
        sides = image.shape[1:]
        factor = self.size * (low + (high - low) * draws[0]) / min(sides)
        # In the image's own pixels, so that nothing beyond the crop is resized.
        cut = [min(side, max(1, round(self.size / factor))) for side in sides]
        first = [
            int(draw * (side - length + 1))
            for draw, side, length in zip(draws[1:], sides, cut, strict=True)
        ]
        height, width = (min(self.size, max(1, round(length * factor))) for length in cut)
        if (height, width) != (self.size, self.size):
            pixels.copy_(self._grey.expand_as(pixels))
            mask.fill_(IGNORED)
        crop_resize(image[:3], (*first, *cut), pixels[:, :height, :width])
        rows, columns = (
            start + _nearest(length, wanted)
            for start, length, wanted in zip(first, cut, (height, width), strict=True)
        )
        mask[:height, :width] = image[3][rows][:, columns]

    def device(self, batch: HostBatch) -> dict[str, Tensor]:
        """Normalised crops, float32 {"global": [1, N, 3, S, S]}, and "mask", uint8 [1, N, 1, S, S].

        Both are flipped alike.
        """
        parameters, masks = batch.draws["global"][:, 0], batch.views["mask"][:, 0]
        flipped = parameters[:, Column.FLIP, None, None, None] > 0
        crops = photometric(batch.views["global"][:, 0], parameters, self.config)
        return {
            "global": crops[None],
            "mask": torch.where(flipped, masks.flip(-1), masks)[None],
        }


def _nearest(length: int, wanted: int) -> Tensor:
    """Of `length` pixels, those whose places are nearest to `wanted` evenly spaced ones."""
    return ((torch.arange(wanted) + 0.5) * length / wanted).long().clamp_(max=length - 1)


def resized(height: int, width: int, short: int) -> tuple[int, int]:
    """Sides of an image whose shorter one is resized to `short` pixels."""
    least = min(height, width)
    return max(short, short * height // least), max(short, short * width // least)


class ShorterSide(StillViews):
    """Whole images, resized, in the upper left corner of a square. Picklable.

    Args:
        config: Normalisation.
        short: Shorter side of an image after the resize, in pixels.
        size: Side of the square, at least the longer side of any image.
    """

    def __init__(self, config: ViewsConfig, short: int, size: int) -> None:
        self.config, self.short, self.size = config, short, size

    def place(self, image: Tensor, square: Tensor) -> None:
        """Writes the image, whose sides are then those of `resized`."""
        height, width = resized(image.shape[1], image.shape[2], self.short)
        crop_resize(image, (0, 0, *image.shape[1:]), square[:, :height, :width])

    def device(self, batch: HostBatch) -> dict[str, Tensor]:
        """Normalised images, float32 {"global": [1, N, 3, S, S]}."""
        pixels = batch.views["global"].transpose(0, 1).float() / 255
        return {"global": normalize(pixels, self.config)}
