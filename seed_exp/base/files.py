"""Files that are whole or absent, whatever kills their writer; the folder of cached files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

log = logging.getLogger("seed_exp")

_TEMPORARY = r"\.[0-9a-f]{16}\.tmp"
"""Pattern of the ending of temporary names."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file object whose content appears under `path` only if the block ends without an exception.

    The content goes to a temporary name in the same folder, is synced to disk, then renamed over
    `path`; the folder is synced too, so that the rename survives a power cut. Several processes may
    write the same path at once: each has its own temporary name and the last rename wins. Temporary
    files of killed writers of this path are removed. The file gets the permissions that the user's
    umask gives to new files.

    Raises:
        OSError: the disk did not take the content, whatever error the block made of that.
    """
    with temporary_beside(path, Path.touch) as temporary:
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


@contextmanager
def temporary_beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside `path`, to be renamed to `path` when it is whole.

    It is removed if it still has its name when the context ends. Those of killed processes are
    removed before: each process holds a lock on its own, which the system takes from it however it
    ends.

    Args:
        path: What it is to become.
        make: Makes it under the name that is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_of_killed(path)
    # Not tempfile's: it is private, and the umask could only be read by changing it, for all
    # threads at once.
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            make(temporary)
        except OSError as error:
            error.filename = os.fspath(path)
            raise
        with suppress(FileNotFoundError):
            held = _open_held(temporary)
            if os.fstat(held).st_nlink > 0:
                break
            os.close(held)  # another process has removed it, in the instant before it was held
    try:
        yield temporary
    finally:
        with suppress(OSError):  # on a disk that can only be read; that error has been raised
            _remove(temporary)
        os.close(held)


def _remove_of_killed(path: Path) -> None:
    """Removes what nobody holds any more among the temporary files and folders of `path`."""
    for left in path.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(path.name)}{_TEMPORARY}", left.name):
            with suppress(OSError):  # it is held, is another user's, or a link
                held = _open_held(left, fcntl.LOCK_NB)
                _remove(left)
                os.close(held)


def _open_held(path: Path, wait: int = 0) -> int:
    """Descriptor of a file or folder of which no other process has one from here.

    Args:
        path: The file or folder.
        wait: 0, or fcntl.LOCK_NB to raise BlockingIOError where another process has one.
    """
    is_folder = path.is_dir()
    # NFS locks only what may be written.
    descriptor = os.open(path, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | wait)
    except OSError:
        if wait:
            os.close(descriptor)
            raise
        # A file system without locks: then nobody can remove it either.
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class _Output(io.FileIO):
    """A new file that remembers the first error of its disk.

    Libraries replace that error: torch.save raises a RuntimeError when it closes its archive.

    Args:
        temporary: The file's name until it is whole.
        path: Its name then; errors say this one.
    """

    def __init__(self, temporary: Path, path: Path) -> None:
        self._path = path
        self.error: OSError | None = None
        with self._remembered():
            super().__init__(temporary, "w")

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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes the system's errors that name no file, such as those of writing, name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def remove_unfinished(folder: Path) -> None:
    """Removes what killed calls of `atomic_write` have left in `folder`.

    The caller has to know that no other process is writing there.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if re.fullmatch(rf"\..+{_TEMPORARY}", path.name):
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


@contextmanager
def sole_process(lock: Path, place: Path, otherwise: str) -> Iterator[bool]:
    """Keeps other processes out of `place` until the context ends.

    Its value says whether they are kept out. It is a record lock of POSIX: the system releases it
    when the process ends, however it ends; worker processes, which may outlive a killed parent, do
    not inherit it; and it works between machines on NFS.

    Args:
        lock: File that is locked, made if absent.
        place: What it stands for, for errors.
        otherwise: What to do instead of waiting for the other process, for the error.

    Raises:
        ValueError: another process keeps this one out.
    """
    held = True
    with open_lock(lock) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{place} is in use by {file.read().strip() or 'another process'}; "
                f"wait for it, or {otherwise}"
            ) from None
        except OSError as error:  # a network file system without locks
            held = False
            log.warning(
                "%s cannot be locked (%s): make sure that only one process writes to it",
                place,
                error,
            )
        with suppress(OSError):  # on a full disk the lock holds without a name
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        yield held


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
