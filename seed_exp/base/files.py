"""Files that are whole or absent, whatever kills their writer; the folder of cached files."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file object whose content appears under `path` only if the block ends without an exception.

    The content goes to a temporary name in the same folder, is synced to disk, then renamed over
    `path`; the folder is synced too, so that the rename survives a power cut. Several processes may
    write the same path at once: each has its own temporary name and the last rename wins. The file
    gets the permissions that the user's umask gives to new files.

    Raises:
        OSError: the disk did not take the content, whatever error the block made of that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile's: it is private, and the umask could only be read by changing it, for all
    # threads at once.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        output = _Output(temporary, path)
        try:
            with io.BufferedWriter(output) as file:
                yield file
                file.flush()
                output.sync()
        except Exception as error:
            if output.error is not None and error is not output.error:
                raise output.error from error
            raise
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class _Output(io.FileIO):
    """A new file that remembers the first error of its disk.

    Libraries replace that error: torch.save raises a RuntimeError when it closes its archive.

    Args:
        temporary: The file's name until it is whole.
        path: Its name then; errors say this one.
    """

    def __init__(self, temporary: Path, path: Path) -> None:
        super().__init__(temporary, "x")
        self._path = path
        self.error: OSError | None = None

    def write(self, content: Any, /) -> int:
        with self._remembered():
            return super().write(content)

    def sync(self) -> None:
        with self._remembered():
            os.fsync(self.fileno())

    @contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = os.fspath(self._path)
            self.error = self.error or error
            raise


def remove_unfinished(folder: Path) -> None:
    """Removes what killed calls of `atomic_write` have left in `folder`.

    The caller has to know that no other process is writing there.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name):
            path.unlink(missing_ok=True)


def no_link(name: str, flags: int) -> int:
    """Opener for `open` that follows no symbolic link to the file (OSError, ELOOP).

    For names that others may have taken in a shared folder: their link can lead to a file of ours.
    """
    return os.open(name, flags | os.O_NOFOLLOW, 0o666)


def open_lock(path: Path) -> IO[str]:
    """The file at `path`, to be locked: open to read and append, made if absent, never cut.

    Raises:
        ValueError: it is a symbolic link.
    """
    try:
        return open(path, "a+", opener=no_link)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(
                f"{path} is a symbolic link; expected a lock file; remove the link"
            ) from None
        raise


def cache_folder() -> Path:
    """Folder of downloads and cached results: $SEED_CACHE, or ~/.cache/seed_exp if it is unset."""
    return Path(os.environ.get("SEED_CACHE") or Path.home() / ".cache" / "seed_exp")


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def append_json(path: Path, content: Any) -> None:
    """Appends `content` as a line of JSON and syncs it.

    It is one write, so that a kill or a full disk can only cut off the last line; the next call
    then begins a new line.

    Raises:
        OSError: the disk did not take all of it.
    """
    line = json.dumps(content).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        left = b"\n" + line if cut else line
        while left:  # a full disk takes a part, and then nothing
            left = left[os.write(descriptor, left) :]
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
