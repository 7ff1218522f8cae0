"""Whatever the sizes: every epoch shows each image at most once.

The images are the same on any number of processes.
"""

from __future__ import annotations

import numpy as np
from fuzzing import fuzz
from hypothesis import strategies as st

from seed_exp.data.order import SampleOrder


@fuzz(
    100,
    world_size=st.integers(1, 9),
    per_rank=st.integers(1, 20),
    num_batches=st.integers(1, 12),
    left=st.integers(0, 10_000),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 5) | st.integers(0, 2**31),
)
def test_an_epoch_is_a_permutation_dealt_to_any_number_of_processes(
    world_size: int, per_rank: int, num_batches: int, left: int, seed: int, epoch: int
) -> None:
    batch_size = world_size * per_rank
    num_samples = batch_size * num_batches + left % batch_size
    one = SampleOrder(num_samples, batch_size, seed)
    assert one.steps_per_epoch == num_batches
    ranks = [
        SampleOrder(num_samples, batch_size, seed, rank, world_size) for rank in range(world_size)
    ]
    shown = []
    for step in range(epoch * num_batches, (epoch + 1) * num_batches):
        found_epoch, batch = one.batch(step)
        assert found_epoch == epoch
        parts = [rank.batch(step) for rank in ranks]
        assert {part[0] for part in parts} == {epoch}
        assert {len(part[1]) for part in parts} == {per_rank}
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), batch)
        shown += batch.tolist()
    assert len(shown) == len(set(shown)) == num_batches * batch_size
    assert set(shown) <= set(range(num_samples))
    if batch_size >= 15:  # by chance the same once in 15!
        assert (
            one.batch(0)[1].tolist()
            != SampleOrder(num_samples, batch_size, seed ^ 1).batch(0)[1].tolist()
        )
