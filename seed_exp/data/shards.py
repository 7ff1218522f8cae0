"""Tar files of images in WebDataset's layout: members KEY.jpg and KEY.cls.

https://github.com/webdataset/webdataset
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from seed_exp.data.decode import decode
from seed_exp.data.fingerprints import middle, sample_hash
from seed_exp.data.image_folder import EXTENSIONS
from seed_exp.data.index import MALFORMED, known_labels, load_index, parse_label

_BLOCK_SIZE = 512  # bytes of a tar block
_MAX_NAME = 1024  # bytes; every record of an index has room for the longest name in the file
_MAX_HEADER = 1 << 16  # bytes; extended headers hold long names and attributes
_MAX_OPEN = 64  # files per process
_MAX_SHARDS = 1_000_000
_PROGRESS_SIZE = 1 << 30  # bytes; indexing more than this shows a progress bar
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}

_WHY_UNCOMPRESSED = (
    "images are read at random places, which only an uncompressed tar allows; "
    "unpack it with gunzip or the like"
)


class ShardsSource:
    """Images of uncompressed tar files, in the order of the files and of the members in each file.

    An image is a member KEY.EXTENSION with an extension of image_folder.EXTENSIONS; KEY ends at the
    first dot of the file name. KEY.cls in the same tar is its class as text; without it the image
    is unlabelled. Other members are ignored. The archives are never unpacked, so that names in them
    cannot reach other files.

    Each shard has an index `X.tar.index.npy` (see `load_index`), made by reading the headers once.
    Instances may be forked or pickled into other processes.

    Args:
        paths: The tar files.
        keep_bad: Whether an image with a malformed KEY.cls counts as an unreadable image; otherwise
            it is an error at once.

    Raises:
        ValueError: a file is missing, compressed, not a tar, cut short or damaged, names a sample
            twice or has no image; or a label is malformed. Reading an image raises it for that
            image.
    """

    labels: NDArray[np.int64] | None

    def __init__(self, paths: Sequence[Path], keep_bad: bool = False) -> None:
        self.paths, self._keep_bad = list(paths), keep_bad
        small = sum(path.stat().st_size for path in self.paths if path.is_file()) < _PROGRESS_SIZE
        shards = tqdm(self.paths, "opening shards", unit="shard", leave=False, disable=small)
        self._indices = [load_index(path, _build_index, _fits) for path in map(_existing, shards)]
        self._ends = np.cumsum([len(index) - 1 for index in self._indices])
        stored = np.concatenate([index["label"][:-1] for index in self._indices])
        self.labels = known_labels(stored, self._malformed, keep_bad)
        self._files: dict[Path, Any] = {}
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W]."""
        path, record = self._find(index)
        return decode(self.encoded(index), f"{_key(record)} ({path})")

    def encoded(self, index: int) -> bytes:
        """The file of image `index`."""
        path, record = self._find(index)
        if record["label"] == MALFORMED:
            raise self._malformed(index)
        try:
            data = os.pread(self._descriptor(path), int(record["size"]), int(record["offset"]))
        except OSError as error:
            raise ValueError(
                f"cannot read image {_key(record)!r} in {path}: {error.strerror}"
            ) from error
        if len(data) < record["size"]:
            raise ValueError(
                f"{path} changed since it was indexed: image {_key(record)!r} is not there; "
                "start again"
            )
        return data

    def key(self, index: int) -> str:
        """Name of the image's member, in which %2E stands for a dot before the last one."""
        return _key(self._find(index)[1])

    def fingerprint(self) -> str:
        """Number of files and images, hash of the indices, hash of bytes of some images.

        The indices hold names, places, sizes and labels of all images.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for index in self._indices:
                digest.update(index[:-1].tobytes())
            content = sample_hash(len(self), self._middle)
            places = digest.hexdigest()[:16]
            self._fingerprint = f"shards:{len(self.paths)}:{len(self)}:{places}+{content}"
        return self._fingerprint

    def _middle(self, index: int) -> bytes:
        """The part of image `index` to read for the fingerprint; empty if it cannot be read."""
        path, record = self._find(index)
        start, length = middle(int(record["offset"]), int(record["size"]))
        try:
            return os.pread(self._descriptor(path), length, start)
        except OSError:
            return b""

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardsSource, (self.paths, self._keep_bad)

    def _find(self, index: int) -> tuple[Path, Any]:
        """The file of image `index`, and its record."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        return self.paths[shard], self._indices[shard][index - first]

    def _malformed(self, index: int) -> ValueError:
        path, record = self._find(index)
        return ValueError(
            f"{path}: the label of image {_key(record)!r} is not the number of a class; "
            "see its member .cls"
        )

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            if len(self._files) == _MAX_OPEN:
                del self._files[next(iter(self._files))]  # this closes the file
            self._files[path] = path.open("rb", buffering=0)
        descriptor: int = self._files[path].fileno()
        return descriptor


def find_shards(root: str, split: str) -> list[Path]:
    """The tar files of a split, sorted; none if the folder `root` has none for it.

    Args:
        root: A folder with train/ and val/ or with train-*.tar and val-*.tar; or the files
            themselves, as a path that may contain {000..146}, {a,b}, * and ?.
        split: `train` or `val`; only used for a folder.

    Raises:
        ValueError: no such file, or the folder has only compressed ones.
    """
    folder = Path(root)
    if not folder.is_dir():
        return _expand(root)
    place, name = (folder / split, "*") if (folder / split).is_dir() else (folder, f"{split}-*")
    found = sorted(place.glob(f"{name}.tar"))
    compressed = sorted([*place.glob(f"{name}.tar.*z*"), *place.glob(f"{name}.tgz")])
    if compressed and not found:
        raise ValueError(f"{compressed[0]} is compressed; {_WHY_UNCOMPRESSED}")
    return found


def _expand(pattern: str) -> list[Path]:
    """The files that a path with {000..146}, {a,b}, * and ? names."""
    found: list[Path] = []
    for path in _braces(pattern):
        if any(mark in path for mark in "*?["):
            found += sorted(Path(match) for match in glob.glob(path))  # noqa: PTH207  (may be absolute)
        elif Path(path).is_file():
            found.append(Path(path))
        else:
            raise ValueError(f"no shard at {path}")
    if not found:
        raise ValueError(f"no shards at {pattern}")
    return found


def _braces(pattern: str) -> list[str]:
    """The pattern with its braces expanded: a0, a1, a2 for `a{0..2}` and for `a{0,1,2}`.

    The numbers of a range are padded with zeros to the width of its first one.
    """
    parts: list[list[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        between = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", text)
        if between:
            first, last = between.groups()
            if int(last) - int(first) >= _MAX_SHARDS:
                raise ValueError(f"{text} in {pattern} are too many shards")
            parts.append(
                [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
            )
        else:
            parts.append(text[1:-1].split(",") if text.startswith("{") else [text])
    return ["".join(choice) for choice in itertools.product(*parts)]


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def _build_index(path: Path) -> NDArray[Any]:
    """Offset, size, label and name of each image [n], from the headers of a tar."""
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    with path.open("rb") as file:
        for member in _members(path, file):
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            sample = f"{folder}/{stem}"
            if not stem:  # a hidden file, such as macOS adds
                continue
            if f".{extension.lower()}" in EXTENSIONS:
                if len(os.fsencode(member.name)) > _MAX_NAME:
                    raise ValueError(
                        f"{path} has an image whose name has {len(os.fsencode(member.name)):,} "
                        f"bytes, {member.name[:60]!r} ...; at most {_MAX_NAME:,} are allowed: "
                        "give it a shorter name"
                    )
                if sample in images:
                    raise ValueError(
                        f"{path} has two images of the same key: "
                        f"{images[sample].name} and {member.name}"
                    )
                images[sample] = member
            elif extension.lower() == "cls":
                try:
                    labels[sample] = parse_label(
                        os.pread(file.fileno(), min(member.size, 64), member.offset)
                    )
                except ValueError:
                    labels[sample] = MALFORMED
    if not images:
        raise ValueError(f"no images in {path}; expected members KEY.jpg or the like, and KEY.cls")
    names = [member.name.encode(errors="surrogateescape") for member in images.values()]
    records = np.zeros(len(images), _record(max(map(len, names))))
    records["key"] = names
    records["offset"] = [member.offset for member in images.values()]
    records["size"] = [member.size for member in images.values()]
    records["label"] = [labels.get(sample, -1) for sample in images]
    return records


def _members(path: Path, file: Any) -> Iterator[_Member]:
    """Yields the regular files in a tar.

    A damaged header is an error here; tarfile would take it for the end of the archive.

    Raises:
        ValueError: the file is compressed, not a tar, cut short or damaged.
    """
    begin = file.read(8)
    for magic, name in _COMPRESSED.items():
        if begin.startswith(magic):
            raise ValueError(f"{path} is compressed ({name}); {_WHY_UNCOMPRESSED}")
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                archive.members.clear()  # each keeps a copy of the archive's attributes
                if member.offset_data <= end:
                    raise ValueError("its headers go round in a circle")
                end = member.offset_data
                if member.isreg() and member.sparse is None:
                    yield _Member(member.name.removeprefix("./"), member.offset_data, member.size)
            end = archive.offset
    # tarfile lets errors of its parsing escape: struct.error, UnicodeDecodeError ...
    except Exception as error:
        raise ValueError(f"cannot read {path} as a tar file: {error}") from error
    if os.pread(file.fileno(), _BLOCK_SIZE, end) != bytes(_BLOCK_SIZE):
        raise ValueError(
            f"{path} is cut short or damaged at byte {end}: "
            "neither another file nor the end of the archive is there"
        )


class _Headers:
    """A tar file that is only read for its headers, which may not be large."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER:
            raise ValueError(
                f"a header of {size:,} bytes, where at most {_MAX_HEADER:,} are allowed; "
                "does it have a very long name?"
            )
        return self._file.read(size)


def _record(key_size: int) -> np.dtype[Any]:
    return np.dtype([("offset", "<u8"), ("size", "<u8"), ("label", "<i8"), ("key", f"S{key_size}")])


def _fits(dtype: np.dtype[Any]) -> bool:
    return dtype.names == ("offset", "size", "label", "key") and dtype == _record(
        dtype["key"].itemsize
    )


def _key(record: Any) -> str:
    name: str = record["key"].decode(errors="replace")
    return name.replace("%2E", ".").replace("%25", "%")


def member_name(key: str) -> str:
    """The name of the member whose `ShardsSource.key` is `key`, which must end in an extension.

    A member's file name may have only one dot: the text after the first dot is its extension.
    """
    folder, slash, name = key.rpartition("/")
    stem, _, extension = name.rpartition(".")
    escaped = stem.replace("%", "%25").replace(".", "%2E")
    return f"{folder.replace('%', '%25')}{slash}{escaped}.{extension}"


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"no shard at {path}")
    return path
