"""Mixup: each view becomes a mean of itself and of the same view of another image.

As arXiv:1710.09412, without labels and with uniform shares, as in arXiv:2106.05237 ("function
matching") and LightlyTrain. Theirs is one share and one random order for a batch. Here the other
image is the neighbour in the epoch's order: its images 0 and 1 are mixed with each other, 2 and 3,
and so on, each with a share of its own. So a mixed view is a function of (seed, epoch, image) like
any other, whatever batches, parts and processes there are, as long as none of them parts a pair.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mixup(views: Tensor, shares: Tensor) -> Tensor:
    """Views of which each has its share of itself, and the rest of its neighbour.

    Args:
        views: Views [V, N, 3, S, S] of N images; images 2k and 2k + 1 are neighbours.
        shares: Each view's share of itself [V, N].

    Returns:
        [V, N, 3, S, S]; of an odd number of images the last one is not mixed.
    """
    num = views.shape[1] // 2 * 2
    own, share = views[:, :num], shares[:, :num, None, None, None]
    pairs = own.reshape(len(own), num // 2, 2, *own.shape[2:])
    other = pairs.flip(2).reshape(own.shape)
    # Not lerp, whose rounding depends on the place in memory and hence on the batch.
    mixed = share * own + (1 - share) * other
    return mixed if num == views.shape[1] else torch.cat([mixed, views[:, num:]], 1)
