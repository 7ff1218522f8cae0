"""The images of each step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seed_exp.data.order import SampleOrder


@given(
    st.integers(1, 60),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(-3, 2**70),
    st.integers(0, 50),
)
def test_ranks_together_see_what_one_process_sees(
    samples: int, per_rank: int, world: int, seed: int, step: int
) -> None:
    batch_size = per_rank * world
    samples += batch_size
    epoch, whole = SampleOrder(samples, batch_size, seed).batch(step)
    parts = [
        SampleOrder(samples, batch_size, seed, rank, world).batch(step) for rank in range(world)
    ]
    assert [part[0] for part in parts] == [epoch] * world
    assert [len(part[1]) for part in parts] == [per_rank] * world
    assert np.array_equal(np.concatenate([part[1] for part in parts]), whole)


@pytest.mark.parametrize(("samples", "batch_size"), [(24, 4), (26, 4), (7, 7), (5, 1)])
def test_an_epoch_has_every_image_at_most_once_and_whole_batches_only(
    samples: int, batch_size: int
) -> None:
    order = SampleOrder(samples, batch_size, seed=3)
    assert order.steps_per_epoch == samples // batch_size
    epochs = []
    for epoch in range(3):
        batches = [
            order.batch(epoch * order.steps_per_epoch + position)
            for position in range(order.steps_per_epoch)
        ]
        assert all(number == epoch and len(indices) == batch_size for number, indices in batches)
        epochs.append(np.concatenate([indices for _, indices in batches]))
        assert len(set(epochs[-1])) == len(epochs[-1]) == samples // batch_size * batch_size
        assert set(epochs[-1]) <= set(range(samples))
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_order_is_pure() -> None:
    order = SampleOrder(100, 10, seed=1)
    forward = [order.batch(step) for step in range(40)]
    backward = [SampleOrder(100, 10, seed=1).batch(step) for step in reversed(range(40))][::-1]
    assert all(
        a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(forward, backward, strict=True)
    )
    assert not np.array_equal(order.batch(0)[1], SampleOrder(100, 10, seed=2).batch(0)[1])


def test_the_order_never_changes() -> None:
    # A run continued with a later version must meet the images that it has not seen in this epoch.
    assert SampleOrder(8, 8, seed=0).batch(0)[1].tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_each_position_is_equally_likely() -> None:
    order = SampleOrder(6, 6, seed=5)
    places = np.zeros((6, 6))
    for epoch in range(3000):
        places[np.arange(6), order.batch(epoch)[1]] += 1
    assert np.abs(places / 3000 - 1 / 6).max() < 0.03  # 4.4 standard deviations


def test_impossible_batch_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=10 does not divide by the 4 processes"):
        SampleOrder(100, 10, 0, 0, 4)
    with pytest.raises(
        ValueError, match="batch_size=128 exceeds the 67 images; take batch_size=67 or less"
    ):
        SampleOrder(67, 128, 0)
