"""Folders that are either whole or absent, as files are by seed_exp.files."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seed_exp.base.files import sync_folder


def refuse_existing(folder: Path) -> None:
    """Raises ValueError if there is something at `folder`, be it no folder: nothing is replaced, as it may have been edited."""
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; delete it, or choose another output")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder whose content appears under the name `folder` only when the block ends without an exception.

    Raises:
        ValueError: as `refuse_existing`.
    """
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        temporary.replace(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
