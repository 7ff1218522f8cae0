"""Ordinary photo libraries: all images below a folder, whatever its order."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seed_exp.data.decode import readable
from seed_exp.data.image_folder import EXTENSIONS, ImageFiles, images_below

_FORMAT_OF = {".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF"}
"""Extension -> format, for formats that not every installation reads."""

_NUM_SHOWN = 6  # kinds of skipped files in the line

log = logging.getLogger("seed_exp")


class PhotosSource(ImageFiles):
    """All images below `root`, at any depth, without labels; the sub-folders are no classes.

    Images and sub-folders of a folder take turns by name. Hidden files and folders and files of
    other kinds are left out; one line of the log counts them.

    Args:
        root: The folder.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """

    labels: NDArray[np.int64] | None = None

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ValueError(f"no folder of photographs at {root}")
        skipped: Counter[str] = Counter()
        found = images_below(os.fsencode(root), b"", _readable_extensions(), skipped)
        text = _describe(skipped)
        if not found:
            raise ValueError(f"no images anywhere below {root}{text and f'; found {text}'}")
        if text:
            _report(f"{root}: {len(found):,} images; skipped {text}")
        super().__init__("photos", root, found)


def _readable_extensions() -> tuple[str, ...]:
    return tuple(
        extension
        for extension in dict.fromkeys([*EXTENSIONS, *_FORMAT_OF])
        if readable(_FORMAT_OF.get(extension, "JPEG"))
    )


def _describe(skipped: Counter[str]) -> str:
    """The counts in words, with the library that would read some; empty if there are none."""
    shown = [f"{num:,} {kind}" for kind, num in skipped.most_common(_NUM_SHOWN)]
    if rest := skipped.total() - sum(num for _, num in skipped.most_common(_NUM_SHOWN)):
        shown.append(f"{rest:,} others")
    unread = {_FORMAT_OF[kind] for kind in skipped if kind in _FORMAT_OF}
    hints = {
        "HEIF": "pip install pillow-heif to read .heic",
        "AVIF": "Pillow 11.3 or later reads .avif",
    }
    advice = "; ".join(hints[name] for name in sorted(unread))
    return ", ".join(shown) + (f" ({advice})" if advice else "")


@functools.cache  # training, held-out and evaluated images come from the same folder
def _report(text: str) -> None:
    log.warning("%s", text)
