"""Hashes by which a source notices that its images are others than before."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NUM_SAMPLED = 256
"""Images of a source whose bytes are read for its fingerprint."""

PART_SIZE = 1 << 16
"""Bytes that are read of each of them."""


def sample_hash(
    num: int, read: Callable[[int], bytes], sizes: NDArray[np.int64] | None = None
) -> str:
    """16 hexadecimal digits that depend on all sizes and on the bytes of evenly spaced images.

    Modification times do not count, because copies of a data set have others.

    Args:
        num: Number of images.
        read: Bytes of an image by its index, see `middle`.
        sizes: Size in bytes of each image [num]; None if the rest of the fingerprint has them.
    """
    digest = hashlib.sha256(b"" if sizes is None else sizes.astype("<i8").tobytes())
    sampled = min(num, NUM_SAMPLED)
    for index in (np.arange(sampled, dtype=np.int64) * num // sampled).tolist():
        part = read(index)
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def middle(start: int, size: int) -> tuple[int, int]:
    """Start and length of the part to read of an image at byte `start`: its middle, if it is long.

    Files of one format, camera or program often begin alike.
    """
    length = min(size, PART_SIZE)
    return start + (size - length) // 2, length


def middle_of(path: Path) -> bytes:
    """The part to read of an image file; empty if it cannot be read, which is no error here."""
    try:
        with path.open("rb", buffering=0) as file:
            start, length = middle(0, os.fstat(file.fileno()).st_size)
            return os.pread(file.fileno(), length, start)
    except OSError:
        return b""


def sizes_of(paths: Sequence[Path]) -> NDArray[np.int64]:
    """Sizes in bytes of files [n]; -1 for one that is not there."""
    return np.fromiter(map(_size, paths), np.int64, len(paths))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
