"""Fixed maps of the teacher's embeddings, fitted on a sample: fewer numbers, or equal variances."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.config.schema import Reduce
from seed_exp.models.hadamard import spreading_rotation

FULL_WIDTH = frozenset({Reduce.standardize, Reduce.phi_s})
"""Kinds that keep the width of the embeddings."""
CONSTANT = 1e-4
"""Share of the largest standard deviation below which a dimension counts as constant."""


class Reduction(nn.Module):
    """Maps unit embeddings [N, in_dim] to embeddings [N, out_dim], narrower or as wide.

    An embedding e becomes normalise((e - mean) @ components), or (e - mean) * components where
    there is one factor for each dimension. `fit_reduction`, `fit_standardisation` and `fit_phi_s`
    make one; a fresh one keeps the first `out_dim` numbers.

    Args:
        in_dim: Width of the embeddings.
        out_dim: Width of what they become.
        elementwise: Whether each dimension only gets a factor of its own.
        unit_length: Whether the result is made as long as 1.

    Raises:
        ValueError: `out_dim` exceeds `in_dim`.
    """

    mean: Tensor
    components: Tensor
    kept_variance: Tensor

    def __init__(
        self, in_dim: int, out_dim: int, *, elementwise: bool = False, unit_length: bool = True
    ) -> None:
        super().__init__()
        if out_dim > in_dim:
            raise ValueError(
                f"teacher.embedding_dim={out_dim} exceeds the {in_dim} numbers of the teacher's "
                "embedding; choose fewer"
            )
        self.out_dim, self.unit_length = out_dim, unit_length
        self.register_buffer("mean", torch.zeros(in_dim))
        factors = torch.ones(in_dim) if elementwise else torch.eye(in_dim, out_dim)
        self.register_buffer("components", factors)
        # Share of the sample's variance that lies in the components.
        self.register_buffer("kept_variance", torch.ones(()))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [N, out_dim], float32 also under autocast; of unit length if asked for.

        Half precision would not do: the mean may be large compared to the differences of images.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            centred = embeddings.float() - self.mean
            if self.components.ndim == 1:
                out = centred * self.components
            else:
                out = centred @ self.components
            return F.normalize(out, dim=1) if self.unit_length else out


def empty_reduction(
    kind: Reduce, in_dim: int, out_dim: int, *, unit_length: bool = True
) -> Reduction:
    """A fresh reduction, whose state has the shapes of this kind; errors as `Reduction`."""
    elementwise = kind is Reduce.standardize
    return Reduction(in_dim, out_dim, elementwise=elementwise, unit_length=unit_length)


def fitted_reduction(kind: Reduce, embeddings: Tensor, dim: int) -> Reduction:
    """The reduction of this kind to `dim` numbers, fitted on a sample [n, in_dim].

    Errors as `fit_reduction`, `fit_standardisation` and `fit_phi_s`.
    """
    if kind is Reduce.standardize:
        return fit_standardisation(embeddings)
    if kind is Reduce.phi_s:
        return fit_phi_s(embeddings)
    return fit_reduction(embeddings, dim, whiten=kind is Reduce.whiten)


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
    mean, variances, components = _principal_components(embeddings)
    components = components[:, :dim]
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


@torch.no_grad()
def fit_standardisation(embeddings: Tensor) -> Reduction:
    """The map to mean 0 and standard deviation 1 in each dimension of `embeddings` [n, D].

    Dimensions that are constant in the sample become 0.

    Raises:
        ValueError: an embedding is not finite, or all are equal.
    """
    dim = embeddings.shape[1]
    reduction = Reduction(dim, dim, elementwise=True)
    _refuse_infinite(embeddings)
    sample = embeddings.double()
    reduction.mean.copy_(sample.mean(0))
    reduction.components.copy_(inverse_std(sample.std(0, correction=0), "embeddings"))
    return reduction


@torch.no_grad()
def fit_phi_s(embeddings: Tensor) -> Reduction:
    """PHI-S (arXiv:2410.01680): principal components, a rotation that spreads their variance evenly
    over all dimensions, and one factor, with which each dimension has standard deviation 1.

    The paper's rotation is a Hadamard matrix. Widths for which `spreading_rotation` has none get
    another orthogonal matrix with the same property; the paper's code has a random one there.
    Unlike standardisation it keeps all angles and ratios of lengths.

    Args:
        embeddings: A sample of unit embeddings [n, D]; n may be less than D.

    Raises:
        ValueError: an embedding is not finite, or all are equal.
    """
    dim = embeddings.shape[1]
    reduction = Reduction(dim, dim)
    mean, variances, components = _principal_components(embeddings)
    variances = variances.clamp_min(0)
    factor = inverse_std(variances.mean().sqrt()[None], "embeddings")
    reduction.mean.copy_(mean)
    reduction.components.copy_(factor * (components @ spreading_rotation(variances).T))
    return reduction


def inverse_std(std: Tensor, what: str) -> Tensor:
    """1 / `std` [D], and 0 for those that are constant: 1 / rounding would make them noise.

    Raises:
        ValueError: all are; `what` names the teacher's outputs in the message.
    """
    largest = std.max()
    if not largest > 1e-10:
        raise ValueError(
            f"the teacher's {what} of all images are equal, and there is nothing to learn from "
            "them: check its weights and the views, or choose another teacher"
        )
    return torch.where(std > CONSTANT * largest, 1 / std, 0.0)


def _principal_components(embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], variances [D] from the largest, and directions [D, D] as columns, float64."""
    _refuse_infinite(embeddings)
    sample = embeddings.double()
    mean = sample.mean(0)
    variances, components = torch.linalg.eigh((sample - mean).T @ (sample - mean) / len(sample))
    return mean, variances.flip(0), components.flip(1)


def _refuse_infinite(embeddings: Tensor) -> None:
    if not embeddings.isfinite().all():
        raise ValueError(
            "some of the teacher's embeddings are not finite: its weights are broken, or its "
            "inputs are"
        )
