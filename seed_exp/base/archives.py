"""Whether a file of torch.save is as it was written, and whether it was memory that lacked."""

from __future__ import annotations

import errno
import re
import zipfile
from pathlib import Path


def is_zip(path: Path) -> bool:
    """Whether the file is a zip archive, as torch.save writes them since torch 1.6."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def check_sums(path: Path) -> None:
    """Compares each entry of a zip archive with its checksum, in little memory.

    torch.load compares none: it would hand out zeroed blocks as weights.

    Raises:
        ValueError: an entry differs.
        zipfile.BadZipFile: it is no whole archive.
    """
    with zipfile.ZipFile(path) as archive:
        if (wrong := archive.testzip()) is not None:
            raise ValueError(f"checksum of {wrong} differs")


def lacks_memory(error: BaseException) -> bool:
    """Whether a reader failed because memory was short, which says nothing about the file."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch raises a RuntimeError: "can't allocate memory", or "unable to mmap ...: Cannot
    # allocate memory"; threads do too, and a library that does not fit is an ImportError. Python
    # itself says "error return without exception set" when it had no memory for the exception.
    said = re.search(
        "allocate memory|failed to map segment|can't start new thread|without exception set",
        str(error),
    )
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError | SystemError) and said is not None
    )
