"""Fingerprints of images: lines such as `image_folder:train:1281167:HASH+SAMPLE`.

Kind, name, number of images, a hash of names or labels, and a hash of sizes and of a sample of the
bytes. A part of a source has `[NUMBER:HASH]` at its end. Versions before 0.2.0 wrote no `+SAMPLE`.
"""

from __future__ import annotations

import re

_SAMPLE = re.compile(r"\+[0-9a-f]{16}")
_NAMED = re.compile(r"^(\w+):(?:.*:)?(\d+:[0-9a-f]{16}\+[0-9a-f]{16})", re.DOTALL)


def is_sampled(fingerprint: str) -> bool:
    """Whether it depends on the content of the images, not only on names or labels."""
    return _SAMPLE.search(fingerprint) is not None


def unsampled(fingerprint: str) -> str:
    """The same fingerprint as versions before 0.2.0 wrote it."""
    return _SAMPLE.sub("", fingerprint)


def content_of(fingerprint: str) -> str:
    """The part that is the same wherever the images are: without the name of a file or folder.

    A fingerprint without a sample stays as it is.
    """
    return _NAMED.sub(r"\1:\2", fingerprint)


def same_images(recorded: str, given: str) -> bool:
    """Whether a recorded fingerprint, of whichever version, is that of the given images."""
    return recorded == unsampled(given) or content_of(recorded) == content_of(given)
