"""A reduction is the projection onto principal components, computed once and then fixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seed_exp.models.reduction import Reduction, fit_reduction


def sample(num: int = 200, dim: int = 12, offset: float = 1.0) -> Tensor:
    """Unit embeddings with a mean and unequal variances of directions, like pooled features."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(num, dim, generator=generator) * torch.logspace(0, -2, dim)
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    return F.normalize(mixed @ rotation + offset, dim=1)


@pytest.mark.parametrize("whiten", [False, True])
def test_it_is_the_projection_of_the_formula(whiten: bool) -> None:
    given = sample().double().numpy()
    centred = given - given.mean(0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)  # another way than ours
    projected = centred @ rows[:5].T
    if whiten:
        projected = projected / (singular[:5] / np.sqrt(len(given)))
    expected = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    reduction = fit_reduction(sample(), 5, whiten=whiten)
    found = reduction(sample()).double().numpy()
    # A component's sign is free, and angles between embeddings do not depend on it.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-5)
    shares = singular**2 / (singular**2).sum()
    assert reduction.kept_variance.item() == pytest.approx(shares[:5].sum(), abs=1e-6)


def test_all_components_of_pca_keep_the_angles_seen_from_the_mean() -> None:
    reduction = fit_reduction(sample(), 12, whiten=False)
    centred = F.normalize(sample() - sample().mean(0), dim=1)
    torch.testing.assert_close(
        reduction(sample()) @ reduction(sample()).T, centred @ centred.T, atol=1e-5, rtol=0
    )


def test_whitened_components_have_the_same_variance_before_normalisation() -> None:
    reduction = fit_reduction(sample(), 7, whiten=True)
    projected = (sample() - reduction.mean) @ reduction.components
    torch.testing.assert_close(
        projected.T @ projected / len(projected), torch.eye(7), atol=1e-3, rtol=0
    )


def test_it_is_computed_in_float32_under_autocast() -> None:
    embeddings = sample(offset=10.0)  # that differ in their last digits
    reduction = fit_reduction(embeddings, 7, whiten=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reduction(embeddings)
    assert torch.equal(found, reduction(embeddings))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(200))


def test_the_same_sample_gives_the_same_bits() -> None:
    one, two = (fit_reduction(sample(), 5, whiten=True).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


def test_a_fresh_one_keeps_the_first_numbers() -> None:
    torch.testing.assert_close(Reduction(12, 3)(sample()), F.normalize(sample()[:, :3], dim=1))


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teacher\.embedding_dim=13 exceeds the 12 numbers"):
        fit_reduction(sample(), 13, whiten=False)
    with pytest.raises(
        ValueError, match=r"of 5 images vary in fewer than 5 directions.*teacher\.num_reduce_images"
    ):
        fit_reduction(sample(num=5), 5, whiten=False)
    with pytest.raises(ValueError, match="fewer than 1 directions"):
        fit_reduction(torch.ones(9, 12) / 12**0.5, 1, whiten=False)
    with pytest.raises(ValueError, match="not finite"):
        fit_reduction(torch.full((9, 12), torch.nan), 3, whiten=False)
