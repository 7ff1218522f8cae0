"""Random numbers as a pure function of (seed, epoch, sample index, stream), without any state.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a 128-bit
counter and a 64-bit key to 128 random bits. The key is the seed; the words of the counter are

    index (low 32 bits) | index (high 32 bits) | epoch | stream (16 bits), block (16 bits)

so that no two samples, epochs or streams share a counter; a stream gives one sample 4 numbers per
block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = np.uint64(0xFFFFFFFF)
_BITS = np.uint64(32)


def philox(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 of every column of `counter`.

    Args:
        counter: The four 32-bit words of each counter [4, ...], each below 2^32, in 64 bits.
        key: The two 32-bit words of the key.

    Returns:
        Four 32-bit random words per counter [4, ...], in 64 bits.
    """
    first, second, third, fourth = counter
    key_low, key_high = key
    for _ in range(_ROUNDS):
        product_low, product_high = _MULTIPLIERS[0] * first, _MULTIPLIERS[1] * third
        first = (product_high >> _BITS) ^ second ^ np.uint64(key_low)
        third = (product_low >> _BITS) ^ fourth ^ np.uint64(key_high)
        second, fourth = product_high & _WORD, product_low & _WORD
        key_low, key_high = (
            (key_low + _KEY_STEPS[0]) & 0xFFFFFFFF,
            (key_high + _KEY_STEPS[1]) & 0xFFFFFFFF,
        )
    return np.stack((first, second, third, fourth))


def uniforms(
    seed: int, epoch: int, indices: NDArray[np.int64], stream: int, num: int
) -> NDArray[np.float64]:
    """`num` uniform numbers for each sample, the same whatever other samples are in `indices`.

    A smaller `num` gives a prefix of what a larger one gives.

    Args:
        seed: 0 to 2^64 - 1.
        epoch: 0 to 2^32 - 1.
        indices: Sample indices [N], >= 0.
        stream: 0 to 2^16 - 1; streams are independent of each other.
        num: Up to 2^18.

    Returns:
        [N, num] in [0, 1), multiples of 2^-32.

    Raises:
        ValueError: the seed is outside its range.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be from 0 to 2^64 - 1, got {seed}")
    blocks = -(-num // 4)
    assert 0 <= epoch < 1 << 32
    assert 0 <= stream < 1 << 16
    assert blocks <= 1 << 16
    assert indices.size == 0 or indices.min() >= 0
    index = indices.astype(np.uint64)[:, None]
    last = np.arange(blocks, dtype=np.uint64) + np.uint64(stream << 16)
    counter = np.stack(np.broadcast_arrays(index & _WORD, index >> _BITS, np.uint64(epoch), last))
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return (
        np.moveaxis(words, 0, -1).reshape(len(indices), 4 * blocks)[:, :num].astype(np.float64)
        / 2.0**32
    )
