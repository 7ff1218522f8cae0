"""TSV files of images: one line per image, `key TAB integer label TAB base64 of the image file`."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from array import array
from collections.abc import Iterator
from io import FileIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from seed_exp.data.decode import decode
from seed_exp.files import atomic_write

_RECORD = np.dtype([("offset", "<u8"), ("label", "<i8")])
_CHUNK_SIZE = 1 << 24  # bytes read at once while the lines are looked for
_HEAD_SIZES = (512, 1 << 16)  # bytes of a line in which its key and label are looked for, first and second try
_PROGRESS_SIZE = 1 << 30  # bytes from which on a file's indexing shows a progress bar


class TsvSource:
    """Images of one TSV file of any size: offsets and labels are memory-mapped, rows are read when asked for.

    The index `X.tsv.index.npy` is written beside `X.tsv` (or, where that folder cannot be written, into the folder that
    the environment variable SEED_CACHE names, ~/.cache/seed_exp by default) when it is absent or does not belong to
    the file's present size and modification time. A file `X.lineidx` (one decimal byte offset per line, as
    the released SEED code writes) saves that pass over the data if it fits.

    A file in which every label is -1 is unlabelled. Instances may be forked or pickled into other processes: each
    process opens the file for itself and reads without a shared position.

    Raises:
        ValueError: the file is missing, empty, changes meanwhile, or a row's key or label is malformed (file and line
            number are named). Reading an image raises it for the row's base64 and image.
    """

    labels: NDArray[np.int64] | None

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"no TSV file at {path}")
        self.path = path
        # Record n closes the last row: its offset is the size of the file, its label the modification time in ns.
        self._index = np.asarray(_load_index(path))
        labels = self._index["label"][:-1]
        self.labels = labels if (labels != -1).any() else None
        self._file: FileIO | None = None
        self._pid = -1

    def __len__(self) -> int:
        return len(self._index) - 1

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W]."""
        key, data = self._row(index)
        return decode(data, f"{key} ({self.path}, line {index + 1})")

    def key(self, index: int) -> str:
        """First column of row `index`."""
        start = int(self._index["offset"][index])
        return _read_head(self._descriptor(), start, self.path, index + 1)[0]

    def fingerprint(self) -> str:
        """Name, number of rows, and a hash of all offsets and labels: the same for a copy of the file elsewhere."""
        digest = hashlib.sha256(self._index["offset"].tobytes() + self._index["label"][:-1].tobytes()).hexdigest()
        return f"tsv:{self.path.name}:{len(self)}:{digest[:16]}"

    def __reduce__(self) -> tuple[Any, ...]:
        return TsvSource, (self.path,)

    def _row(self, index: int) -> tuple[str, bytes]:
        start, end = (int(offset) for offset in self._index["offset"][index : index + 2])
        line = os.pread(self._descriptor(), end - start, start).rstrip(b"\r\n")
        if b"\n" in line:
            wrong = f"{self.path.with_suffix('.lineidx').name} and {_index_places(self.path)[0].name}"
            raise _row_error(self.path, index + 1, f"the line index leaves lines out; delete {wrong}")
        columns = line.split(b"\t")
        if len(columns) != 3:
            raise _row_error(self.path, index + 1, f"expected 3 columns (key, label, base64), got {len(columns)}")
        key = columns[0].decode(errors="replace")
        try:
            return key, base64.b64decode(columns[2], validate=True)
        except binascii.Error as error:
            raise _row_error(self.path, index + 1, f"the image {key!r} is not valid base64: {error}") from error

    def _descriptor(self) -> int:
        # A descriptor inherited through fork is left to the parent, which may close it.
        if self._file is None or self._pid != os.getpid():
            self._file, self._pid = self.path.open("rb", buffering=0), os.getpid()
        return self._file.fileno()


def _index_places(path: Path) -> list[Path]:
    cache = Path(os.environ.get("SEED_CACHE") or Path.home() / ".cache" / "seed_exp")
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return [path.with_name(f"{path.name}.index.npy"), cache / "tsv" / f"{path.stem}-{name}.index.npy"]


def _load_index(path: Path) -> NDArray[Any]:
    places = _index_places(path)
    stat = path.stat()
    for place in places:
        index = _open_index(place, stat)
        if index is not None:
            return index
    built = _build_index(path)
    for place in places:
        try:
            with atomic_write(place) as file:
                np.save(file, built)
        except OSError:
            continue
        index = _open_index(place, stat)
        if index is not None:
            return index
    return built  # nowhere to write: each process keeps its own copy, 16 bytes per row


def _open_index(place: Path, stat: os.stat_result) -> NDArray[Any] | None:
    """The index in `place` if it is whole and belongs to the file with this `stat`."""
    try:
        index: NDArray[Any] = np.load(place, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # absent, cut short, or another kind of file
        return None
    if index.dtype != _RECORD or index.ndim != 1 or len(index) < 2:
        return None
    return index if tuple(index[-1].tolist()) == (stat.st_size, stat.st_mtime_ns) else None


def _build_index(path: Path) -> NDArray[Any]:
    """Offsets and labels of all rows [n + 1], from one pass over the file, or from its `.lineidx` if that fits."""
    with path.open("rb", buffering=0) as file:
        descriptor = file.fileno()
        stat = os.fstat(descriptor)
        if stat.st_size == 0:
            raise ValueError(f"{path} is empty; expected lines of key, label and base64, separated by tabs")
        offsets, labels = array("Q"), array("q")
        starts = _read_lineidx(path, descriptor, stat.st_size) or _line_starts(descriptor, 0, stat.st_size)
        small = stat.st_size < _PROGRESS_SIZE
        with tqdm(total=stat.st_size, desc=f"indexing {path.name}", unit="B", unit_scale=True, disable=small) as progress:
            for number, start in enumerate(starts, 1):
                offsets.append(start)
                labels.append(_read_head(descriptor, start, path, number)[1])
                progress.update(start - progress.n)
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        raise ValueError(f"{path} changed while its lines were counted; start again when it is complete")
    index = np.empty(len(offsets) + 1, _RECORD)
    index["offset"][:-1], index["label"][:-1] = offsets, labels
    index[-1] = stat.st_size, stat.st_mtime_ns
    return index


def _read_lineidx(path: Path, descriptor: int, size: int) -> list[int] | None:
    """Line starts according to `X.lineidx`, or None if it is absent or does not fit the file.

    Checked: offsets grow from 0, a line feed stands before each, and the last line ends with the file. A line left out in
    the middle shows when its neighbour is read (a line feed inside the row).
    """
    try:
        starts = [int(line) for line in path.with_suffix(".lineidx").read_bytes().split()]
    except (OSError, ValueError):
        return None
    if not starts or starts[0] != 0 or starts[-1] >= size or any(a >= b for a, b in pairwise(starts)):
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
    columns = head.partition(b"\n")[0].split(b"\t", 2)
    if len(columns) != 3:
        raise _row_error(path, number, f"expected 3 columns (key, label, base64), got {len(columns)}")
    try:
        return columns[0].decode(errors="replace"), int(np.int64(int(columns[1])))
    except (ValueError, OverflowError):
        raise _row_error(path, number, f"the label must be an integer, got {columns[1][:40]!r}") from None


def _row_error(path: Path, number: int, what: str) -> ValueError:
    return ValueError(f"{path}, line {number}: {what}")
