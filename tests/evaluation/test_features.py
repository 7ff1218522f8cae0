from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from ranks import Ranks
from torch import Tensor

from seed_exp.config.schema import Precision
from seed_exp.data.subsets import evenly_spaced
from seed_exp.evaluation.features import Extracted, Extractor
from seed_exp.views.recipe import EvalViews


def encoders() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {"a": tiny.Encoder(4, bn=True).eval(), "b": tiny.Encoder(6, bn=False).eval()}


def extract(indices: NDArray[np.int64], batch_size: int, num_workers: int = 0) -> Extracted:
    extractor = Extractor(
        EvalViews(tiny.views_config()), torch.device("cpu"), num_workers, batch_size
    )
    return extractor(encoders(), tiny.Images(), indices)


def one_by_one(indices: NDArray[np.int64]) -> dict[str, Tensor]:
    views, source = EvalViews(tiny.views_config()), tiny.Images()
    rows: dict[str, list[Tensor]] = {"a": [], "b": []}
    for index in indices:
        batch = views.empty(1)
        views.host([source.image(index)], np.zeros(1, np.int64), 0, np.array([index]), batch)
        for name, encoder in encoders().items():
            rows[name].append(encoder(views.device(batch)["global"][0])[0].detach())
    return {name: torch.stack(features) for name, features in rows.items()}


class Unreadable(tiny.Images):
    """Its images 3 and 39, the last one, cannot be read."""

    def image(self, index: int) -> Tensor:
        if index in (3, 39):
            raise ValueError(f"image {index} is damaged")
        return super().image(index)


INDICES = np.array([7, 3, 39, 0, 12, 3, 25, 26, 27, 1, 38], dtype=np.int64)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 256])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_are_in_the_order_of_the_indices(batch_size: int, num_workers: int) -> None:
    features, labels, read = extract(INDICES, batch_size, num_workers)
    for name, expected in one_by_one(INDICES).items():
        assert features[name].dtype == torch.float32
        torch.testing.assert_close(features[name], expected)
    assert labels.tolist() == [tiny.Images().labels[index] for index in INDICES]
    assert read.tolist() == INDICES.tolist()


@pytest.mark.parametrize("num", [1, 2, 5, 11])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_first_of_two_processes_gets_the_same_as_one(
    num: int, batch_size: int, two_ranks: Ranks
) -> None:
    one, labels, read = extract(INDICES[:num], batch_size)
    (features, first_labels, first_read), others = two_ranks.run(extract, INDICES[:num], batch_size)
    for name in one:
        torch.testing.assert_close(features[name], one[name])
    assert torch.equal(first_labels, labels)
    assert torch.equal(first_read, read)
    assert others[0] == {}
    assert [len(others[1]), len(others[2])] == [0, 0]


def test_an_image_in_the_place_of_an_unreadable_one_says_so_with_its_number_and_label() -> None:
    found: list[int] = []
    extractor = Extractor(
        EvalViews(tiny.views_config()),
        torch.device("cpu"),
        0,
        batch_size=4,
        bad_samples=lambda _: lambda index, _: found.append(index),
    )
    source = Unreadable()
    features, labels, read = extractor(encoders(), source, INDICES)
    expected = [{3: 4, 39: 0}.get(index, index) for index in INDICES.tolist()]
    assert read.tolist() == expected
    assert labels.tolist() == [source.labels[index] for index in expected]
    assert sorted(set(found)) == [3, 39]
    for name, rows in one_by_one(np.array(expected)).items():
        torch.testing.assert_close(features[name], rows)


def test_no_gradient_is_kept_and_bfloat16_features_come_back_as_float32() -> None:
    extractor = Extractor(
        EvalViews(tiny.views_config()), torch.device("cpu"), 0, precision=Precision.bfloat16
    )
    features = extractor(encoders(), tiny.Images(), INDICES).features
    full = one_by_one(INDICES)
    for name in full:
        assert not features[name].requires_grad
        assert features[name].dtype == torch.float32
        assert not torch.equal(features[name], full[name])
        torch.testing.assert_close(features[name], full[name], rtol=0.05, atol=0.02)


def test_spread_takes_one_image_of_each_stretch() -> None:
    assert evenly_spaced(10).tolist() == list(range(10))
    assert evenly_spaced(10, 100).tolist() == list(range(10))
    assert (evenly_spaced(10, 5) // 2).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(2_000_000, 1_999_999).dtype == np.int64
    for num, at_most in ((7, 3), (1000, 333), (50_000, 5000)):
        edges = np.arange(at_most + 1) * num // at_most
        assert (edges[:-1] <= evenly_spaced(num, at_most)).all()
        assert (evenly_spaced(num, at_most) < edges[1:]).all()
        assert np.array_equal(evenly_spaced(num, at_most), evenly_spaced(num, at_most))


@pytest.mark.parametrize("num", [100_000, 49_950])
def test_spread_meets_all_classes_in_a_sorted_list_and_in_one_where_they_take_turns(
    num: int,
) -> None:
    for labels in (np.arange(num) * 10 // num, np.arange(num) % 10):
        counts = np.bincount(labels[evenly_spaced(num, 2000)], minlength=10)
        assert counts.min() > 140
        assert counts.max() < 260
