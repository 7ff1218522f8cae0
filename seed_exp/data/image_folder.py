"""Folders of image files."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.data.decode import decode
from seed_exp.data.fingerprints import middle_of, sample_hash

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".jp2",
    ".avif",
)
"""Files with these extensions, in either case, are images."""


class ImageFiles:
    """Image files below one folder: everything of a source but its labels.

    Args:
        kind: First word of the fingerprint.
        root: The folder.
        found: Path below the root and size in bytes of each file, in the order of the images.
    """

    def __init__(self, kind: str, root: Path, found: Iterable[tuple[bytes, int]]) -> None:
        self.kind, self.root = kind, root
        # One buffer with offsets: a million str objects would be copied into every worker by
        # reference counting.
        files = list(found)
        self._names = np.frombuffer(b"".join(path for path, _ in files), np.uint8)
        self._ends = np.cumsum([len(path) for path, _ in files], dtype=np.int64)
        self._sizes = np.array([size for _, size in files], np.int64)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W]."""
        return decode(self.encoded(index), str(self.root / self.key(index)))

    def encoded(self, index: int) -> bytes:
        """The file of image `index`."""
        path = self.root / self.key(index)
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read image {path}: {error.strerror}") from error

    def key(self, index: int) -> str:
        """Path of image `index` below the root."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._names[start : self._ends[index]].tobytes())

    def fingerprint(self) -> str:
        """Name, number of images, hash of all paths below the root, hash of sizes and bytes."""
        if self._fingerprint is None:
            paths = hashlib.sha256(self._names.tobytes() + self._ends.tobytes()).hexdigest()
            content = sample_hash(
                len(self), lambda index: middle_of(self.root / self.key(index)), self._sizes
            )
            self._fingerprint = f"{self.kind}:{self.root.name}:{len(self)}:{paths[:16]}+{content}"
        return self._fingerprint


class ImageFolderSource(ImageFiles):
    """Images below one folder, sorted by name.

    The sub-folders of `root`, sorted, are the classes 0, 1, ...; images may lie in them at any
    depth. A folder that holds images and no sub-folder is unlabelled. Hidden files and folders are
    ignored.

    Args:
        root: Folder of class folders, or of images.
        classes: Names of the class folders in label order; None = those of `root`, sorted. Give the
            training split's names for a validation split, so that both have the same labels.

    Raises:
        ValueError: no such folder, no image in it, images both beside and in sub-folders, or a
            sub-folder that is not in `classes`. Reading an image raises it for a file that is gone
            or broken.
    """

    labels: NDArray[np.int64] | None

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        if not root.is_dir():
            raise ValueError(f"no folder of images at {root}")
        place = os.fsencode(root) + b"/"
        entries = visible(place)
        folders = [os.fsdecode(entry.name) for entry in entries if entry.is_dir()]
        self.classes = list(classes or folders)
        label_of = {name: label for label, name in enumerate(self.classes)}
        unknown = sorted(set(folders) - label_of.keys())
        if unknown:
            raise ValueError(
                f"{root} has classes that the training images do not have: {', '.join(unknown[:5])}"
            )
        found: list[tuple[bytes, int]] = []
        labels = np.array([label_of[name] for name in folders], np.int64)
        counts = np.zeros(len(folders), np.int64)
        for number, name in enumerate(folders):
            before = len(found)
            prefix = os.fsencode(name) + b"/"
            found += images_below(place + prefix, prefix)
            counts[number] = len(found) - before
        beside = [entry for entry in entries if _is_image(entry, _SUFFIXES)]
        if found and beside:
            raise ValueError(
                f"{root} holds images both in sub-folders and beside them "
                f"(such as {os.fsdecode(beside[0].name)}); "
                "expected one sub-folder per class, or only images; "
                "data=photos takes whatever is there, without classes"
            )
        self.labels = np.repeat(labels, counts) if found else None
        found = found or [(entry.name, _size(entry)) for entry in beside]
        if not found:
            raise ValueError(f"no images in {root}; looked for {' '.join(EXTENSIONS)}")
        super().__init__("image_folder", root, found)


def class_names(root: Path) -> list[str]:
    """Names of the visible sub-folders of `root`, sorted."""
    return [os.fsdecode(entry.name) for entry in visible(os.fsencode(root)) if entry.is_dir()]


def visible(folder: bytes) -> list[os.DirEntry[bytes]]:
    """The entries of a folder that are not hidden, sorted by name."""
    return [entry for entry in _entries(folder) if not entry.name.startswith(b".")]


def images_below(
    folder: bytes,
    prefix: bytes = b"",
    extensions: Collection[str] = EXTENSIONS,
    skipped: Counter[str] | None = None,
) -> list[tuple[bytes, int]]:
    """Path below `folder` and size in bytes (-1 = gone) of every image there, sorted by name.

    The files and sub-folders of each folder take turns by name. A link to a folder that holds the
    link is left out.

    Args:
        folder: The folder.
        prefix: Put in front of every path.
        extensions: Extensions of images, in lower case.
        skipped: Counts, by kind, what is no visible image, and folders that cannot be read. None =
            such a folder is an error.
    """
    suffixes = _SUFFIXES if extensions is EXTENSIONS else _suffixes(extensions)
    found: list[tuple[bytes, int]] = []
    # Not recursive: folders may be nested more deeply than Python's stack allows.
    stack = [(folder, prefix, iter(_entries(folder)))]
    while stack:
        _, prefix, entries = stack[-1]
        for entry in entries:
            if entry.name.startswith(b"."):
                kind = "hidden"
            elif _is_image(entry, suffixes):
                found.append((prefix + entry.name, _size(entry)))
                continue
            elif not entry.is_dir():
                extension = os.fsdecode(entry.name).rpartition(".")[1:]
                kind = "".join(extension).lower() if extension[0] else "without extension"
            elif entry.is_symlink() and _is_one_of(entry, [place for place, *_ in stack]):
                kind = "link to a folder around it"
            else:
                try:
                    inner = iter(_entries(entry.path))
                except OSError:
                    if skipped is None:
                        raise
                    kind = "folder without permission"
                else:
                    stack.append((entry.path, prefix + entry.name + b"/", inner))
                    break
            if skipped is not None:
                skipped[kind] += 1
        else:
            stack.pop()
    return found


def _suffixes(extensions: Iterable[str]) -> frozenset[bytes]:
    return frozenset(extension.removeprefix(".").encode() for extension in extensions)


_SUFFIXES = _suffixes(EXTENSIONS)


def _is_image(entry: os.DirEntry[bytes], suffixes: frozenset[bytes]) -> bool:
    _, dot, suffix = entry.name.rpartition(b".")
    return bool(dot) and suffix.lower() in suffixes and entry.is_file()


def _is_one_of(entry: os.DirEntry[bytes], folders: Sequence[bytes]) -> bool:
    stat = entry.stat()
    return any(os.path.samestat(stat, os.stat(folder)) for folder in folders)  # noqa: PTH116


def _size(entry: os.DirEntry[bytes]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
