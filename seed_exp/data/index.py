"""Index of the images in a large file: made in one pass, kept beside it or in the cache."""

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
"""Marks a row without a valid label, so that one bad row does not cost the whole file."""

_LARGEST_LABEL = 2**31 - 1


def load_index(
    path: Path, build: Callable[[Path], NDArray[Any]], fits: Callable[[np.dtype[Any]], bool]
) -> NDArray[Any]:
    """The records that `build` makes of a file [n], and a closing record [n + 1 in all].

    The closing record holds the file's size in bytes as `offset` and its modification time in ns as
    `label`. The index is kept in `X.index.npy` beside the file `X`, or in `cache_folder()` if that
    folder is read-only. It is made anew if it is absent or the closing record does not fit the
    file's present size and time.

    Args:
        path: The file.
        build: Returns records with the fields `offset` and `label` among others.
        fits: Whether a dtype is that of records from `build`.

    Raises:
        ValueError: `build` found something wrong, or the file changes while it is indexed.
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
    """Paths where the index of a file may be, the preferred one first."""
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
    # Absent, cut short or another kind of file: NumPy parses the header as Python and raises errors
    # of all kinds.
    except Exception:
        return None
    if not fits(index.dtype) or index.ndim != 1 or len(index) < 2:
        return None
    if any(
        (index[field] > stat.st_size).any()
        for field in {"offset", "size"} & set(index.dtype.names or ())
    ):
        return None  # damaged: a read would go beyond the file's end
    closing = int(index["offset"][-1]), int(index["label"][-1])
    return np.asarray(index) if closing == (stat.st_size, stat.st_mtime_ns) else None


def parse_label(text: bytes) -> int:
    """The label in `text`: the number of a class, or -1 for no label.

    Raises:
        ValueError: `text` is not such a number.
    """
    try:
        label = int(text)
    except ValueError:
        label = -2
    if not -1 <= label <= _LARGEST_LABEL:
        raise ValueError(
            "the label must be an integer, the number of a class from 0 on or -1 for none, "
            f"got {text[:40]!r}"
        )
    return label


def known_labels(
    stored: NDArray[np.int64], explain: Callable[[int], ValueError], keep_bad: bool
) -> NDArray[np.int64] | None:
    """Labels from an index [n]; None if no image has one.

    Args:
        stored: Labels in the index [n]; MALFORMED marks malformed rows.
        explain: Returns the error of a malformed row.
        keep_bad: Whether malformed rows are allowed. Each then gets the label of the next good row,
            whose image the loader takes instead.

    Raises:
        ValueError: a row is malformed and `keep_bad` is false, or all rows are malformed.
    """
    bad = stored == MALFORMED
    if bad.any():
        if not keep_bad or bad.all():
            raise explain(int(bad.argmax()))
        good = np.flatnonzero(~bad)
        stored = stored[good[np.searchsorted(good, np.arange(len(stored))) % len(good)]]
    return stored if (stored != -1).any() else None


def check_labels(labels: NDArray[np.int64], where: str) -> NDArray[np.int64] | None:
    """The labels [n]; None if no image has one.

    Raises:
        ValueError: one is neither the number of a class nor -1.
    """
    wrong = labels[(labels < -1) | (labels > _LARGEST_LABEL)]
    if len(wrong):
        raise ValueError(
            f"{where}: a label must be the number of a class from 0 on or -1 for none, "
            f"got {wrong[0]}"
        )
    return labels if (labels != -1).any() else None
