from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from seed_exp.methods.collapse import effective_rank, embedding_std


def test_vectors_all_over_the_sphere_have_std_1_and_full_rank() -> None:
    embeddings = F.normalize(
        torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0)), dim=1
    )
    assert embedding_std(embeddings).item() == pytest.approx(1, abs=0.02)
    assert effective_rank(embeddings).item() == pytest.approx(16, rel=0.01)


def test_equal_vectors_have_std_0_and_rank_1() -> None:
    embeddings = F.normalize(torch.ones(10, 16), dim=1)
    assert embedding_std(embeddings).item() == pytest.approx(0, abs=1e-6)
    assert effective_rank(embeddings).item() == pytest.approx(1, abs=1e-3)


def test_the_rank_is_the_exponential_of_the_singular_values_entropy() -> None:
    shares = [0.5, 0.3, 0.2]
    embeddings = torch.diag(torch.tensor(shares)) * 7
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(embeddings).item() == pytest.approx(expected, rel=1e-5)


def test_the_std_equals_that_computed_by_hand() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    assert embedding_std(embeddings).item() == pytest.approx(math.sqrt(0.5) * math.sqrt(2))


def test_what_is_not_finite_gives_a_number_and_no_error() -> None:
    assert effective_rank(torch.full((3, 4), torch.nan)).item() == 0
