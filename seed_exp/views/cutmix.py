"""CutMix: a rectangle of one view in another one, and the area that is left of the latter."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_CUTMIX_DRAWS = 5
"""Uniform numbers that one mix takes."""


def cutmix_boxes(
    draws: NDArray[np.float64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rectangles of CutMix (arXiv:1905.04899), with the share drawn from Beta(2, 2) as in BINGO.

    A square with a share 1 - lambda of the area, its centre uniform; what lies outside is lost.

    Args:
        draws: Uniform numbers in [0, 1) [N, NUM_CUTMIX_DRAWS].
        size: Side S of the views in pixels.

    Returns:
        (top, left, bottom, right) in pixels [N, 4], ends excluded, and the share of each view's
        area outside of its rectangle [N].
    """
    share = np.sort(draws[:, :3], axis=1)[:, 1]  # the middle one of three is Beta(2, 2)
    half = (size * np.sqrt(1 - share)).astype(np.int64)[:, None] // 2
    centre = (size * draws[:, 3:]).astype(np.int64)
    boxes = np.concatenate([centre - half, centre + half], 1).clip(0, size)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return boxes, 1 - area / size**2


def cutmix(views: Tensor, others: Tensor, boxes: Tensor) -> Tensor:
    """The views [N, 3, S, S] with the rectangles `boxes` [N, 4] of the others in them."""
    places = torch.arange(views.shape[-1], device=views.device)
    rows, columns = (
        (boxes[:, side, None] <= places) & (places < boxes[:, side + 2, None]) for side in (0, 1)
    )
    return torch.where((rows[:, :, None] & columns[:, None])[:, None], others, views)
