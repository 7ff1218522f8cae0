"""Where the images of a large file lie: found in one pass, kept beside the file or in the cache, memory-mapped from then on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seed_exp.base.files import atomic_write, cache_folder

MALFORMED = np.iinfo(np.int64).min
"""Stands in an index for a label that is none: one bad row must not cost the file."""

_LARGEST_LABEL = 2**31 - 1


def load_index(
    path: Path, build: Callable[[Path], NDArray[Any]], fits: Callable[[np.dtype[Any]], bool]
) -> NDArray[Any]:
    """The records that `build` makes of a file, and one more that closes them.

    They are kept in `X.index.npy` beside the file `X` (or, where that folder cannot be written, in the folder that the
    environment variable SEED_CACHE names, ~/.cache/seed_exp by default), and made anew when that is absent or does not belong
    to the file's present size and modification time in ns, which are `offset` and `label` of the closing record.

    Args:
        path: The file.
        build: Gives records with the fields `offset` and `label` among others.
        fits: Whether records of this type are such as `build` gives.

    Raises:
        ValueError: what `build` found wrong, or the file changes meanwhile.
    """
    places = index_places(path)
    stat = path.stat()
    for place in places:
        index = _open_index(place, stat, fits)
        if index is not None:
            return index
    records = build(path)
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        raise ValueError(f"{path} changed while it was indexed; start again when it is complete")
    closed = np.zeros(len(records) + 1, records.dtype)
    closed[:-1] = records
    closed["offset"][-1], closed["label"][-1] = stat.st_size, stat.st_mtime_ns
    for place in places:
        try:
            with atomic_write(place) as file:
                np.save(file, closed)
        except OSError:
            continue
        index = _open_index(place, stat, fits)
        if index is not None:
            return index
    return closed  # nowhere to write: each process keeps its own copy


def index_places(path: Path) -> list[Path]:
    """Where the index of a file may be, the best place first."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return [
        path.with_name(f"{path.name}.index.npy"),
        cache_folder() / "index" / f"{path.name}-{name}.index.npy",
    ]


def _open_index(
    place: Path, stat: os.stat_result, fits: Callable[[np.dtype[Any]], bool]
) -> NDArray[Any] | None:
    """The index in `place` if it is whole and belongs to the file with this `stat`."""
    try:
        index: NDArray[Any] = np.load(place, mmap_mode="r")
    except Exception:  # absent, cut short, or another kind of file: NumPy reads the header as Python, with errors of all kinds
        return None
    if not fits(index.dtype) or index.ndim != 1 or len(index) < 2:
        return None
    if any(
        (index[field] > stat.st_size).any()
        for field in {"offset", "size"} & set(index.dtype.names or ())
    ):
        return None  # damaged: a row would be read from beyond the end, or take more memory than the file is long
    closing = int(index["offset"][-1]), int(index["label"][-1])
    return np.asarray(index) if closing == (stat.st_size, stat.st_mtime_ns) else None


def parse_label(text: bytes) -> int:
    """The class that `text` names, -1 = none.

    Raises:
        ValueError: it names none.
    """
    try:
        label = int(text)
    except ValueError:
        label = -2
    if not -1 <= label <= _LARGEST_LABEL:
        raise ValueError(
            f"the label must be an integer, the number of a class from 0 on or -1 for none, got {text[:40]!r}"
        )
    return label


def known_labels(
    stored: NDArray[np.int64], explain: Callable[[int], ValueError], keep_bad: bool
) -> NDArray[np.int64] | None:
    """Labels from an index [n]; None if no image has one.

    Args:
        stored: As in the index; MALFORMED for rows that are not what they should be.
        explain: Gives the error of such a row.
        keep_bad: Whether there may be such rows. Each then has the label of the good row behind it, whose image the loader
            takes instead.

    Raises:
        ValueError: there is a malformed row although there may be none, or no other row.
    """
    bad = stored == MALFORMED
    if bad.any():
        if not keep_bad or bad.all():
            raise explain(int(bad.argmax()))
        good = np.flatnonzero(~bad)
        stored = stored[good[np.searchsorted(good, np.arange(len(stored))) % len(good)]]
    return stored if (stored != -1).any() else None
