"""The queue of earlier embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Queue(nn.Module):
    """The last K embeddings, first in first out.

    It starts with random unit vectors drawn from `seed`, the same in every process; to start it
    with others, enqueue K of them. Any number of
    embeddings may be enqueued at a time; K need not be a multiple of it.

    Args:
        size: K.
        dim: Width D of an embedding.
        seed: Seed of the initial vectors.
    """

    embeddings: Tensor
    """[K, D], unit length."""

    def __init__(self, size: int, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "embeddings", F.normalize(torch.randn(size, dim, generator=generator), dim=1)
        )
        self.position = 0

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor) -> None:
        """Replaces the oldest entries by `embeddings` [M, D]; of more than K, the last K stay.

        An embedding that is not finite replaces nothing: it would spoil the loss of later steps.
        """
        size = len(self.embeddings)
        end = self.position + len(embeddings)
        newest = embeddings[-size:]
        rows = torch.arange(end - len(newest), end, device=self.embeddings.device) % size
        usable = newest.isfinite().all(1, keepdim=True)
        replaced = torch.where(usable, newest.to(self.embeddings.dtype), self.embeddings[rows])
        self.embeddings[rows] = replaced
        self.position = end % size

    def get_extra_state(self) -> int:
        """The position is a Python number, so that moving it never waits for the GPU."""
        return self.position

    def set_extra_state(self, state: int) -> None:
        """Takes the position from a checkpoint."""
        self.position = state
