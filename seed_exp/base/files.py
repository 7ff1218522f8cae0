"""Files that are whole or absent, whatever kills their writer; the folder of cached files."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file object whose content appears under `path` only if the block ends without an exception.

    The content goes to a temporary name in the same folder, is synced to disk, then renamed over
    `path`; the folder is synced too, so that the rename survives a power cut. Several processes may
    write the same path at once: each has its own temporary name and the last rename wins. The file
    gets the permissions that the user's umask gives to new files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile's: it is private, and the umask could only be read by changing it, for all
    # threads at once.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Folder of downloads and cached results: $SEED_CACHE, or ~/.cache/seed_exp if it is unset."""
    return Path(os.environ.get("SEED_CACHE") or Path.home() / ".cache" / "seed_exp")


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def append_json(path: Path, content: Any) -> None:
    """Appends `content` as a line of JSON and syncs it.

    It is one write, so that a kill can only cut off the last line; the next call then begins a new
    line.
    """
    line = json.dumps(content).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" + line if cut else line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_lines(text: str) -> list[dict[str, Any]]:
    """The objects in lines of JSON; lines that are cut off or hold no object are left out."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
