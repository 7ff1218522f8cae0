"""Average precision and recall against loops written from their definitions."""

from __future__ import annotations

import pytest
import reference
import torch

from seed_exp.evaluation.retrieval import retrieval
from seed_exp.evaluation.votes import MIB

KS = [1, 5, 10]


def made(num: int, seed: int, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num,), generator=draws)
    features = torch.randn(num, 7, generator=draws) + torch.nn.functional.one_hot(labels, 7)
    return features, labels


@pytest.mark.parametrize("memory", [1, 20_000, 256 * MIB])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_it_is_the_definition_whatever_the_tiles(memory: int, leave_one_out: bool) -> None:
    gallery, labels = made(90, 0)
    labels[:4] = torch.arange(20, 24)  # these classes have one image
    queries, query_labels = (gallery, labels) if leave_one_out else made(40, 1, classes=7)
    own = torch.arange(90).flip(0) if leave_one_out else None
    if own is not None:
        queries, query_labels = gallery[own], labels[own]
    found = retrieval(gallery, labels, queries, query_labels, ks=KS, own=own, memory=memory)
    expected = reference.retrieval(
        gallery.double().tolist(),
        labels.tolist(),
        queries.double().tolist(),
        query_labels.tolist(),
        KS,
        None if own is None else own.tolist(),
    )
    assert list(found.measures) == ["map", "recall1", "recall5", "recall10"]
    assert found.measures == pytest.approx(expected, abs=1e-4)
    alone = 4 if leave_one_out else int((query_labels == 6).sum())
    assert found.num_queries == len(queries) - alone
    assert alone > 0


def test_equal_features_earn_nothing_by_the_order_of_the_files() -> None:
    features = torch.ones(12, 4)
    labels = torch.arange(3).repeat_interleave(4)
    found = retrieval(features, labels, features[:4], labels[:4], ks=KS, own=torch.arange(4))
    # Eight images of other classes stand first, then three of the class: 1/9, 2/10, 3/11.
    expected = {"map": 100 * (1 / 9 + 2 / 10 + 3 / 11) / 3, "recall1": 0, "recall5": 0}
    assert found.measures == pytest.approx({**expected, "recall10": 100})


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_one_feature_for_all_images_earns_nothing_however_its_products_round(
    leave_one_out: bool,
) -> None:
    features = torch.randn(1, 512, generator=torch.Generator().manual_seed(0)).repeat(500, 1)
    labels = torch.arange(100).repeat_interleave(5)
    own = torch.arange(500) if leave_one_out else None
    found = retrieval(features, labels, features, labels, ks=[1], own=own).measures
    assert found["recall1"] == 0
    assert found["map"] < 1


def test_a_perfect_encoder_and_one_that_confuses_two_classes() -> None:
    corners = torch.eye(4).repeat_interleave(5, 0)
    labels = torch.arange(4).repeat_interleave(5)
    queries, query_labels = torch.eye(4), torch.arange(4)
    perfect = retrieval(corners, labels, queries, query_labels, ks=[1]).measures
    assert perfect == {"map": 100, "recall1": 100}
    swapped = retrieval(corners, labels, queries, torch.tensor([1, 0, 2, 3]), ks=[1]).measures
    assert swapped["recall1"] == 50


def test_without_anything_to_find_it_is_an_error() -> None:
    features, labels = torch.eye(5), torch.arange(5)
    with pytest.raises(ValueError, match="no query has another image of its class"):
        retrieval(features, labels, features, labels, ks=[1], own=torch.arange(5))
    features[0, 0] = torch.nan
    with pytest.raises(ValueError, match="features must be finite"):
        retrieval(features, labels * 0, features, labels * 0, ks=[1])
