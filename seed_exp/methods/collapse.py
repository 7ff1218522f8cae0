"""Measures of how much of their space embeddings use, which show collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def embedding_std(embeddings: Tensor) -> Tensor:
    """Standard deviation over the batch, averaged over the dimensions, times sqrt(D).

    SimSiam, arXiv:2011.10566, Section 4.1.

    Args:
        embeddings: Embeddings of a batch [N, D], unit length.

    Returns:
        Scalar: 1 for vectors spread evenly over the sphere, 0 if all are equal.
    """
    std: Tensor = embeddings.float().std(0, correction=0).mean()
    return std * math.sqrt(embeddings.shape[1])


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values.

    RankMe, arXiv:2210.02885, Eq. 1.

    Args:
        embeddings: Embeddings of a batch [N, D].

    Returns:
        Scalar from 1 (all on one line) to min(N, D); 0 if any embedding is not finite.
    """
    finite = embeddings.isfinite().all()
    values = torch.linalg.svdvals(torch.where(finite, embeddings.float(), 0.0))
    shares = values / values.sum().clamp_min(1e-12)
    return torch.where(finite, torch.special.entr(shares).sum().exp(), 0.0)
