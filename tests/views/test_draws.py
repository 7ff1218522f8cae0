from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seed_exp.views.draws import philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that come with Random123 (kat_vectors, philox4x32 10)
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: str, key: str, expected: str) -> None:
    words = np.array([[int(word, 16)] for word in counter.split()], dtype=np.uint64)
    low, high = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox(words, (low, high))[:, 0]] == expected.split()


def test_the_counter_is_index_epoch_stream_block_and_the_key_is_the_seed() -> None:
    seed, epoch, index, stream = 0xA409382213579BDF, 7, (5 << 32) + 3, 11
    for block in (0, 1):
        counter = np.array([[3], [5], [epoch], [(stream << 16) + block]], dtype=np.uint64)
        words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[:, 0]
        drawn = uniforms(seed, epoch, np.array([index]), stream, 8)[0, 4 * block : 4 * block + 4]
        np.testing.assert_array_equal(drawn, words / 2.0**32)


@given(
    indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=20),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 2**16 - 1),
    num=st.integers(1, 30),
)
def test_a_samples_numbers_do_not_depend_on_the_other_samples_or_on_how_many_are_drawn(
    indices: list[int], seed: int, epoch: int, stream: int, num: int
) -> None:
    together = uniforms(seed, epoch, np.array(indices), stream, num)
    assert together.shape == (len(indices), num)
    assert together.min() >= 0
    assert together.max() < 1
    for row, index in zip(together, indices, strict=True):
        np.testing.assert_array_equal(
            uniforms(seed, epoch, np.array([index]), stream, num + 5)[0, :num], row
        )


def test_seeds_epochs_samples_and_streams_share_no_numbers() -> None:
    indices = np.array([0, 1, 2**32, 2**32 + 1])
    drawn = [
        uniforms(seed, epoch, indices, stream, 9)
        for seed in (0, 1, 2**32)
        for epoch in (0, 1)
        for stream in (0, 1, 256)
    ]
    values = np.concatenate([part.ravel() for part in drawn])
    assert len(np.unique(values)) == len(
        values
    )  # 648 numbers of 32 bits: a chance collision has probability 5e-5


def test_numbers_are_uniform_and_neighbours_uncorrelated() -> None:
    drawn = uniforms(0, 0, np.arange(50_000), 0, 6)
    counts = np.stack([np.histogram(column, bins=20, range=(0, 1))[0] for column in drawn.T])
    assert np.abs(counts - 2500).max() < 5 * 2500**0.5
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 5 / 50_000**0.5
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 5 / 50_000**0.5


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"seed must be from 0 to 2\^64 - 1"):
        uniforms(seed, 0, np.array([0]), 0, 1)
