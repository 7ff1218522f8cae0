"""Converts views as the students see them to images as a teacher was trained to see them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class InputSpec:
    """The images that a network expects."""

    mean: list[float]
    """Mean of the pixel values (0 to 1) per channel, subtracted."""
    std: list[float]
    """Standard deviation of the pixel values (0 to 1) per channel, divided by."""
    size: int | None = None
    """The only side in pixels that the network takes; None = several."""
    multiple_of: int = 1
    """Divisor of every side that the network takes: the size of its patches in pixels."""
    interpolation: str = "bicubic"
    """How images are resized: bicubic or bilinear."""


IMAGENET = InputSpec(IMAGENET_MEAN, IMAGENET_STD)


class Inputs(nn.Module):
    """Turns views into the images that the network of `spec` expects.

    Views that fit already pass unchanged, bit for bit. Views are normalised anew if
    `normalised_with` said that their normalisation differs. They are resized to the network's only
    size, or by the factor that `resized_by` set, and up to the next multiple of its patches: a ViT
    with patches of 14 px sees a view of 96 px as 98.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.spec = spec
        self.factor = 1, 1
        self.register_buffer("scale", None)
        self.register_buffer("shift", None)

    def normalised_with(self, mean: list[float], std: list[float]) -> None:
        """Sets the mean and standard deviation per channel with which the views are normalised."""
        if (mean, std) == (self.spec.mean, self.spec.std):
            self.scale = self.shift = None
            return
        ours, theirs = (
            torch.tensor(values, dtype=torch.float64).view(2, 3, 1, 1)
            for values in ([mean, std], [self.spec.mean, self.spec.std])
        )
        self.scale = (ours[1] / theirs[1]).float()
        self.shift = ((ours[0] - theirs[0]) / theirs[1]).float()

    def resized_by(self, to: int, of: int) -> None:
        """Makes views of `of` pixels `to` pixels wide, and others wider in proportion."""
        self.factor = to, of

    def size(self, size: int) -> int:
        """Side in pixels to which views of `size` pixels are resized."""
        to, of = self.factor
        wanted, multiple = round(size * to / of), self.spec.multiple_of
        return self.spec.size or max(1, math.ceil(wanted / multiple)) * multiple

    def forward(self, views: Tensor) -> Tensor:
        """Images [N, 3, T, T], float32, from views [N, 3, S, S]; T is `size(S)`."""
        if self.scale is not None and self.shift is not None:
            views = torch.addcmul(self.shift, views, self.scale)
        size = self.size(views.shape[-1])
        if size == views.shape[-1]:
            return views
        # With antialiasing the kernels are Pillow's, also for enlargement.
        return F.interpolate(views, size=(size, size), mode=self.spec.interpolation, antialias=True)
