"""Host half of the views: crops of photographs of any size, resized straight into uint8 batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

_ATTEMPTS = 10
_LONGEST = 16  # times the shorter side
NUM_CROP_DRAWS = 2 * _ATTEMPTS + 2
"""Uniform numbers that one random resized crop takes."""


def random_resized_crop_boxes(
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    draws: NDArray[np.float64],
    scale: Sequence[float],
    aspect_ratio: Sequence[float],
) -> NDArray[np.int64]:
    """Boxes distributed as those of torchvision's RandomResizedCrop.

    Ten attempts to draw an area (uniform) and an aspect ratio (log-uniform) that fit into the
    image, then a uniform position; if none fits, the largest centred box whose aspect ratio is
    allowed.

    Args:
        heights: Heights of the images in pixels; any shape that broadcasts to [...].
        widths: Their widths.
        draws: Uniform numbers in [0, 1) [..., NUM_CROP_DRAWS].
        scale: Smallest and largest share of the image's area.
        aspect_ratio: Smallest and largest width / height.

    Returns:
        (top, left, height, width) in pixels [..., 4]; inside the image and at least one pixel.
    """
    heights, widths = np.broadcast_arrays(heights, widths)
    tall, wide = heights[..., None], widths[..., None]
    area_draws, ratio_draws = draws[..., :_ATTEMPTS], draws[..., _ATTEMPTS : 2 * _ATTEMPTS]
    area = tall * wide * (scale[0] + (scale[1] - scale[0]) * area_draws)
    log_low, log_high = math.log(aspect_ratio[0]), math.log(aspect_ratio[1])
    ratio = np.exp(log_low + (log_high - log_low) * ratio_draws)
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (width <= wide) & (height > 0) & (height <= tall)
    chosen = fits.argmax(-1)[..., None]
    crop_width = np.take_along_axis(width, chosen, -1)[..., 0]
    crop_height = np.take_along_axis(height, chosen, -1)[..., 0]
    top = np.floor(draws[..., -2] * (heights - crop_height + 1))
    left = np.floor(draws[..., -1] * (widths - crop_width + 1))
    drawn = np.stack((top, left, crop_height, crop_width), -1)
    return np.where(
        fits.any(-1, keepdims=True), drawn, _centre_boxes(heights, widths, aspect_ratio)
    ).astype(np.int64)


def _centre_boxes(
    heights: NDArray[np.int64], widths: NDArray[np.int64], aspect_ratio: Sequence[float]
) -> NDArray[np.float64]:
    """The largest centred boxes of an allowed aspect ratio, (top, left, height, width) [..., 4]."""
    height = np.clip(np.rint(widths / aspect_ratio[0]), 1, heights)
    width = np.clip(np.rint(heights * aspect_ratio[1]), 1, widths)
    return np.stack(((heights - height) // 2, (widths - width) // 2, height, width), -1)


def crop_resize(image: Tensor, box: Sequence[int], out: Tensor) -> None:
    """Writes the crop `box` of `image` into `out`, resized with antialiased bilinear interpolation.

    Within one grey level of Pillow's crop and resize; over photographs 0.03 on average.

    Args:
        image: uint8 [3, H, W], any strides; fastest when its memory is [H, W, 3], as decoders leave
            it, and that of `out` too.
        box: (top, left, height, width) in pixels.
        out: uint8 [3, S, S], any strides.
    """
    top, left, height, width = box
    out.copy_(_resize(image[:, top : top + height, left : left + width], out.shape[-2:]))


def resize_center_crop(image: Tensor, resize: int, out: Tensor) -> None:
    """Writes the centre of `image` into `out`, after resizing its shorter side to `resize` pixels.

    The sizes and offsets are those of torchvision's Resize(resize) and CenterCrop(S).

    Args:
        image: uint8 [3, H, W], any strides.
        resize: Shorter side after the resize in pixels, at least S.
        out: uint8 [3, S, S], any strides.
    """
    size = out.shape[-1]
    short = min(image.shape[1:])
    # Only the middle of a long strip is wanted; enlarged as a whole it would be gigabytes.
    for dim in (1, 2):
        beyond = image.shape[dim] - _LONGEST * short
        if beyond > 0:
            image = image.narrow(dim, beyond // 2, _LONGEST * short)
    height, width = (resize * side // short for side in image.shape[1:])
    top, left = round((height - size) / 2), round((width - size) / 2)
    out.copy_(_resize(image, (height, width))[:, top : top + size, left : left + size])


def _resize(image: Tensor, size: Sequence[int]) -> Tensor:
    # image[None] has the stride of a batch of planes, and interpolate would turn its result into
    # planes.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)[0]
