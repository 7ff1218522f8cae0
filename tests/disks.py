"""Fills disks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def fill(disk: Path, leave: int = 0) -> Path:
    """Fills the disk up to `leave` bytes; returns the file that does, to be removed for room."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        file.truncate(file.tell() - leave)
    return ballast
