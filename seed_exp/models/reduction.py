"""Narrower embeddings: a fixed projection onto the principal components of a sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Reduction(nn.Module):
    """Maps unit embeddings [N, in_dim] to narrower unit embeddings [N, out_dim].

    An embedding e becomes normalise((e - mean) @ components). `fit_reduction` makes one; a fresh
    one keeps the first `out_dim` numbers.

    Raises:
        ValueError: `out_dim` exceeds `in_dim`.
    """

    mean: Tensor
    components: Tensor
    kept_variance: Tensor

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        if out_dim > in_dim:
            raise ValueError(
                f"teacher.embedding_dim={out_dim} exceeds the {in_dim} numbers of the teacher's "
                "embedding; choose fewer"
            )
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("components", torch.eye(in_dim, out_dim))
        # Share of the sample's variance that lies in the components.
        self.register_buffer("kept_variance", torch.ones(()))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [N, out_dim] of unit length, float32 also under autocast.

        Half precision would not do: the mean may be large compared to the differences of images.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            return F.normalize((embeddings.float() - self.mean) @ self.components, dim=1)


@torch.no_grad()
def fit_reduction(embeddings: Tensor, dim: int, *, whiten: bool) -> Reduction:
    """The projection onto the `dim` principal components of `embeddings` with the largest variance.

    Args:
        embeddings: A sample of unit embeddings [n, in_dim].
        dim: Components to keep.
        whiten: Whether each component is divided by its standard deviation, so that all have equal
            weight.

    Raises:
        ValueError: `dim` exceeds the width of the embeddings, an embedding is not finite, or the
            sample is too small or varies too little for so many components.
    """
    num, in_dim = embeddings.shape
    reduction = Reduction(in_dim, dim)
    if not embeddings.isfinite().all():
        raise ValueError(
            "some of the teacher's embeddings are not finite: its weights are broken, or its "
            "inputs are"
        )
    sample = embeddings.double()
    mean = sample.mean(0)
    variances, components = torch.linalg.eigh((sample - mean).T @ (sample - mean) / num)
    variances, components = variances.flip(0), components.flip(1)[:, :dim]
    if not variances[dim - 1] > 1e-10 * variances[0]:
        raise ValueError(
            f"the teacher's embeddings of {num} images vary in fewer than {dim} directions; "
            "choose a smaller teacher.embedding_dim, or give more images "
            "(teacher.num_reduce_images)"
        )
    reduction.mean.copy_(mean)
    reduction.components.copy_(components / variances[:dim].sqrt() if whiten else components)
    reduction.kept_variance.copy_(variances[:dim].sum() / variances.clamp_min(0).sum())
    return reduction
