"""Folders of image files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.data.decode import decode

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


class ImageFolderSource:
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
        self.root = root
        folders = class_names(root)
        self.classes = list(classes or folders)
        unknown = sorted(set(folders) - set(self.classes))
        if unknown:
            raise ValueError(
                f"{root} has classes that the training images do not have: {', '.join(unknown[:5])}"
            )
        # One buffer with offsets: a million str objects would be copied into every worker by
        # reference counting.
        paths: list[bytes] = []
        labels: list[int] = []
        for name in folders:
            found = list(_walk(os.fsencode(root / name), os.fsencode(name) + b"/"))
            paths += found
            labels += [self.classes.index(name)] * len(found)
        beside = [entry for entry in _visible(os.fsencode(root)) if _is_image(entry)]
        if paths and beside:
            raise ValueError(
                f"{root} holds images both in sub-folders and beside them "
                f"(such as {os.fsdecode(beside[0].name)}); "
                "expected one sub-folder per class, or only images"
            )
        self.labels = np.array(labels, np.int64) if paths else None
        paths = paths or [entry.name for entry in beside]
        if not paths:
            raise ValueError(f"no images in {root}; looked for {' '.join(EXTENSIONS)}")
        self._names = np.frombuffer(b"".join(paths), np.uint8)
        self._ends = np.cumsum([len(path) for path in paths])

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
        """Name, number of images, and a hash of all paths below the root."""
        digest = hashlib.sha256(self._names.tobytes() + self._ends.tobytes()).hexdigest()
        return f"image_folder:{self.root.name}:{len(self)}:{digest[:16]}"


def class_names(root: Path) -> list[str]:
    """Names of the visible sub-folders of `root`, sorted."""
    return [os.fsdecode(entry.name) for entry in _visible(os.fsencode(root)) if entry.is_dir()]


def _visible(folder: bytes) -> list[os.DirEntry[bytes]]:
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not entry.name.startswith(b".")),
            key=lambda entry: entry.name,
        )


def _is_image(entry: os.DirEntry[bytes]) -> bool:
    return os.fsdecode(entry.name).lower().endswith(EXTENSIONS) and entry.is_file()


def _walk(folder: bytes, prefix: bytes) -> Iterator[bytes]:
    """Paths of all images below `folder`, each with `prefix` in front."""
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _walk(entry.path, prefix + entry.name + b"/")
        elif _is_image(entry):
            yield prefix + entry.name
