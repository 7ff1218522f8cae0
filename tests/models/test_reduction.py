"""A reduction is a fixed map, computed once: a projection, a standardisation or PHI-S."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seed_exp.models.hadamard import hadamard, spreading_rotation
from seed_exp.models.reduction import (
    Reduction,
    fit_phi_s,
    fit_reduction,
    fit_standardisation,
    inverse_std,
)


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


# --- full width -----------------------------------------------------------------------------------


def test_standardised_dimensions_have_mean_0_and_deviation_1_and_constant_ones_are_0() -> None:
    given = sample()
    given[:, 3] = 0.25
    found = F.normalize(given, dim=1)  # the constant is one no more, so it is put back
    found[:, 3] = 0.25
    reduction = fit_standardisation(found)
    reduction.unit_length = False
    rows = reduction(found).double()
    expected = (found.double() - found.double().mean(0)) / found.double().std(0, correction=0)
    others = [dim for dim in range(12) if dim != 3]
    torch.testing.assert_close(rows[:, others], expected[:, others], atol=1e-4, rtol=1e-4)
    assert not rows[:, 3].any()
    reduction.unit_length = True
    torch.testing.assert_close(reduction(found), F.normalize(rows.float(), dim=1))


@pytest.mark.parametrize("dim", [16, 12, 10])
def test_phi_s_is_the_formula_and_each_dimension_gets_the_same_variance(dim: int) -> None:
    given = sample(dim=dim)
    reduction = fit_phi_s(given)
    reduction.unit_length = False
    rows = reduction(given).double()
    torch.testing.assert_close(rows.mean(0), torch.zeros(dim).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        rows.std(0, correction=0), torch.ones(dim).double(), atol=1e-3, rtol=0
    )
    # One factor and a rotation: all angles and ratios of lengths are those of the centred sample.
    centred = given.double() - given.double().mean(0)
    factor = (dim / (centred * centred).sum(1).mean()).sqrt()
    torch.testing.assert_close(rows @ rows.T, factor**2 * centred @ centred.T, atol=2e-3, rtol=1e-3)
    matrix = reduction.components.double() / factor
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim).double(), atol=1e-5, rtol=0)
    if dim != 10:  # PHI-S, Section 3: factor x H U^T (x - mean), here with numpy's U
        variances, directions = np.linalg.eigh(np.cov(centred.numpy().T, bias=True))
        spread = np.abs(directions.T @ reduction.components.double().numpy())
        np.testing.assert_allclose(spread, float(factor) / dim**0.5, rtol=1e-3)
        assert float(factor) == pytest.approx(variances.mean() ** -0.5, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 28, 36, 60, 192, 384, 576, 1152, 1280])
def test_hadamard_matrices_have_ones_and_rows_at_right_angles(order: int) -> None:
    matrix = hadamard(order)
    assert matrix is not None
    assert set(matrix.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order).double())


@pytest.mark.parametrize("order", [3, 6, 7, 52, 130])
def test_where_there_is_none_another_rotation_gives_equal_variances(order: int) -> None:
    assert hadamard(order) is None
    variances = torch.logspace(2, -6, order, dtype=torch.float64)
    rotation = spreading_rotation(variances)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(order).double(), atol=1e-12, rtol=0)
    found = (rotation * variances @ rotation.T).diagonal()
    torch.testing.assert_close(found, variances.mean().expand(order), rtol=1e-10, atol=0)


def test_a_sample_smaller_than_its_width_is_enough_at_full_width() -> None:
    for fit in (fit_phi_s, fit_standardisation):
        reduction = fit(sample(num=5))
        torch.testing.assert_close(reduction(sample()).norm(dim=1), torch.ones(200))


def test_what_cannot_be_standardised_is_refused() -> None:
    for fit in (fit_phi_s, fit_standardisation):
        with pytest.raises(ValueError, match="embeddings of all images are equal"):
            fit(torch.ones(9, 12) / 12**0.5)
        with pytest.raises(ValueError, match="not finite"):
            fit(torch.full((9, 12), torch.nan))
    assert inverse_std(torch.tensor([2.0, 1e-6]), "maps").tolist() == [0.5, 0]


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
