"""Folders that are either complete or absent, as `seed_exp.base.files` does it for files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seed_exp.base.files import naming, sync_folder, temporary_beside


def refuse_existing(folder: Path) -> None:
    """Raises ValueError if `folder` is a file, a link, or a folder that is not empty.

    Nothing is replaced, because somebody may have edited it.
    """
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; delete it, or choose another output")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder, renamed to `folder` only if the block ends without an exception.

    What killed writers of `folder` have left is removed.

    Raises:
        ValueError: there is something at `folder` already.
    """
    refuse_existing(folder)
    with temporary_beside(folder, Path.mkdir) as temporary:
        with naming(folder):
            yield temporary
            for path in temporary.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(temporary)
        refuse_existing(folder)  # another process may have been faster
        temporary.replace(folder)
        sync_folder(folder.parent)
