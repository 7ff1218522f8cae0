"""TSV files of images: one line per image, `key TAB integer label TAB base64 of the image file`."""

from __future__ import annotations

import binascii
import hashlib
import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pybase64 import b64decode
from torch import Tensor
from tqdm import tqdm

from seed_exp.data.decode import decode
from seed_exp.data.fingerprints import middle, sample_hash
from seed_exp.data.index import MALFORMED, index_places, known_labels, load_index, parse_label

_RECORD = np.dtype([("offset", "<u8"), ("label", "<i8")])
_CHUNK_SIZE = 1 << 24  # bytes read at once in search of line ends
# Bytes of a line that are searched for its key and label, at the first and the second try.
_HEAD_SIZES = (512, 1 << 16)
_PROGRESS_SIZE = 1 << 30  # bytes; indexing a file larger than this shows a progress bar


class TsvSource:
    """Images of one TSV file of any size: offsets and labels memory-mapped, rows read on demand.

    The file has an index `X.tsv.index.npy` (see `load_index`). A file `X.lineidx` (one decimal byte
    offset per line, as the released SEED code writes) saves the pass over the data if it fits.

    A file in which every label is -1 is unlabelled. Instances may be forked or pickled into other
    processes: each process opens the file for itself and reads without a shared position.

    Args:
        path: The file.
        keep_bad: Whether a row with a malformed key or label counts as an unreadable image;
            otherwise it is an error at once.

    Raises:
        ValueError: the file is missing, empty, changes meanwhile, or a row's key or label is
            malformed (file and line number are named). Reading an image raises it for the row and
            its image.
    """

    labels: NDArray[np.int64] | None

    def __init__(self, path: Path, keep_bad: bool = False) -> None:
        if not path.is_file():
            raise ValueError(f"no TSV file at {path}")
        self.path, self._keep_bad = path, keep_bad
        self._index = load_index(path, _build_index, lambda dtype: dtype == _RECORD)
        self._file: FileIO | None = None
        self._pid = -1
        self._fingerprint: str | None = None
        self.labels = known_labels(self._index["label"][:-1], self._malformed, keep_bad)

    def __len__(self) -> int:
        return len(self._index) - 1

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W]."""
        key, data = self._row(index)
        return decode(data, f"{key} ({self.path}, line {index + 1})")

    def encoded(self, index: int) -> bytes:
        """The file of image `index`."""
        return self._row(index)[1]

    def key(self, index: int) -> str:
        """First column of row `index`; empty if the row has none."""
        with suppress(ValueError):
            return _read_head(
                self._descriptor(), int(self._index["offset"][index]), self.path, index + 1
            )[0]
        return ""

    def fingerprint(self) -> str:
        """Name, number of rows, hash of all offsets and labels, hash of bytes of some rows."""
        if self._fingerprint is None:
            digest = hashlib.sha256(
                self._index["offset"].tobytes() + self._index["label"][:-1].tobytes()
            ).hexdigest()
            content = sample_hash(len(self), self._middle)
            self._fingerprint = f"tsv:{self.path.name}:{len(self)}:{digest[:16]}+{content}"
        return self._fingerprint

    def _middle(self, index: int) -> bytes:
        """The part of row `index` to read for the fingerprint; empty if it cannot be read."""
        start, end = (int(offset) for offset in self._index["offset"][index : index + 2])
        begin, length = middle(start, max(0, end - start))
        try:
            return os.pread(self._descriptor(), length, begin)
        except OSError:
            return b""

    def __reduce__(self) -> tuple[Any, ...]:
        return TsvSource, (self.path, self._keep_bad)

    def _row(self, index: int) -> tuple[str, bytes]:
        start, end = (int(offset) for offset in self._index["offset"][index : index + 2])
        try:
            line = os.pread(self._descriptor(), end - start, start)
            return self._parse(line, end - start, int(self._index["label"][index]), index + 1)
        except OSError as error:
            raise _row_error(self.path, index + 1, f"cannot be read: {error.strerror}") from error
        except ValueError as error:
            stat = os.fstat(self._descriptor())
            if (stat.st_size, stat.st_mtime_ns) != tuple(self._index[-1].tolist()):
                raise ValueError(
                    f"{error}; the file changed since it was indexed, start again"
                ) from error
            raise

    def _parse(self, line: bytes, size: int, known_label: int, number: int) -> tuple[str, bytes]:
        """Key and image file of a whole line; `size` and `known_label` are those in the index."""
        if len(line) < size:
            raise _row_error(self.path, number, f"only {len(line)} of {size} bytes are left")
        line = line.rstrip(b"\r\n")
        if b"\n" in line:
            wrong = (
                f"{self.path.with_suffix('.lineidx').name} and {index_places(self.path)[0].name}"
            )
            raise _row_error(self.path, number, f"the line index leaves lines out; delete {wrong}")
        columns = line.split(b"\t")
        key, label = _parse_head(columns, self.path, number)
        if label != known_label:
            raise _row_error(
                self.path, number, f"the label is {label}, but {known_label} in the index"
            )
        if len(columns) > 3:
            raise _row_error(
                self.path, number, f"expected 3 columns (key, label, base64), got {len(columns)}"
            )
        try:
            return key, b64decode(columns[2], validate=True)
        except binascii.Error as error:
            raise _row_error(
                self.path, number, f"the image {key!r} is not valid base64: {error}"
            ) from error

    def _malformed(self, index: int) -> ValueError:
        try:
            _read_head(self._descriptor(), int(self._index["offset"][index]), self.path, index + 1)
        except ValueError as error:
            return error
        return _row_error(self.path, index + 1, "malformed when it was indexed")

    def _descriptor(self) -> int:
        # A descriptor inherited through fork is left to the parent, which may close it.
        if self._file is None or self._pid != os.getpid():
            self._file, self._pid = self.path.open("rb", buffering=0), os.getpid()
        return self._file.fileno()


def _build_index(path: Path) -> NDArray[Any]:
    """Offsets and labels of all rows [n], from a `.lineidx` that fits, else from one pass."""
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise ValueError(
                f"{path} is empty; expected lines of key, label and base64, separated by tabs"
            )
        offsets, labels = array("Q"), array("q")
        starts = _read_lineidx(path, descriptor, size) or _line_starts(descriptor, 0, size)
        with tqdm(
            total=size,
            desc=f"indexing {path.name}",
            unit="B",
            unit_scale=True,
            disable=size < _PROGRESS_SIZE,
        ) as progress:
            for number, start in enumerate(starts, 1):
                offsets.append(start)
                try:
                    labels.append(_read_head(descriptor, start, path, number)[1])
                except ValueError:
                    labels.append(MALFORMED)
                progress.update(start - progress.n)
    records = np.empty(len(offsets), _RECORD)
    records["offset"], records["label"] = offsets, labels
    return records


def _read_lineidx(path: Path, descriptor: int, size: int) -> list[int] | None:
    """Line starts according to `X.lineidx`, or None if it is absent or does not fit the file.

    Checked: offsets grow from 0, a line feed stands before each, and the last line ends with the
    file. A line left out in the middle shows when its neighbour is read (a line feed inside the
    row).
    """
    try:
        starts = [int(line) for line in path.with_suffix(".lineidx").read_bytes().split()]
    except (OSError, ValueError):
        return None
    if (
        not starts
        or starts[0] != 0
        or starts[-1] >= size
        or any(a >= b for a, b in pairwise(starts))
    ):
        return None
    if any(os.pread(descriptor, 1, start - 1) != b"\n" for start in starts[1:]):
        return None
    more = islice(_line_starts(descriptor, starts[-1], size), 1, None)
    return starts if next(more, None) is None else None


def _line_starts(descriptor: int, begin: int, size: int) -> Iterator[int]:
    """`begin` and the start of every later line of a file of `size` bytes."""
    yield begin
    for position in range(begin, size, _CHUNK_SIZE):
        chunk = np.frombuffer(os.pread(descriptor, _CHUNK_SIZE, position), np.uint8)
        starts = np.flatnonzero(chunk == ord("\n")) + position + 1
        yield from starts[starts < size].tolist()


def _read_head(descriptor: int, start: int, path: Path, number: int) -> tuple[str, int]:
    """Key and label of the line that begins at byte `start`; `number` counts from 1."""
    head = b""
    for size in _HEAD_SIZES:
        head = os.pread(descriptor, size, start)
        if head.count(b"\t") >= 2 or b"\n" in head:
            break
    return _parse_head(head.partition(b"\n")[0].rstrip(b"\r").split(b"\t", 2), path, number)


def _parse_head(columns: list[bytes], path: Path, number: int) -> tuple[str, int]:
    """Key and label from the first of at least three columns."""
    if len(columns) < 3:
        found = len(columns) if columns != [b""] else "an empty line"
        raise _row_error(path, number, f"expected 3 columns (key, label, base64), got {found}")
    try:
        return columns[0].decode("utf-8-sig", errors="replace"), parse_label(columns[1])
    except ValueError as error:
        raise _row_error(path, number, str(error)) from None


def _row_error(path: Path, number: int, what: str) -> ValueError:
    return ValueError(f"{path}, line {number}: {what}")
