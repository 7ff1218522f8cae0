"""Checkpoints of a run: written whole or not at all, in a thread of their own.

A run goes on from the newest one that can be read.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_exp.base.archives import check_sums, lacks_memory
from seed_exp.base.files import atomic_write
from seed_exp.engine import distributed

log = logging.getLogger("seed_exp")

KEEP = 2
"""Checkpoints that are kept: the newest, and the one before in case the newest is damaged."""
LAST_TRIES = 6
"""Attempts to write the checkpoint at the end of training when the disk does not take it."""
PAUSE_S = 10.0
"""Seconds between these attempts."""
OF_CONTENT = frozenset({errno.EINVAL, errno.EIO})
"""System errors that reading a damaged file gives; others say nothing about the content."""


class CheckpointWriter:
    """Writes checkpoints/step_<step>.pt of the run folder on rank 0, while training goes on.

    The state is copied when it is handed over; after that the loop waits only if the checkpoint
    before is not yet on disk. A disk that is full or away costs that checkpoint, not the run: the
    next one is another attempt.

    Args:
        folder: Run folder.
        keep: Whether the checkpoint after so many steps stays for good; only the newest KEEP of the
            others do.
        before_write: Called in the thread with each state before it is written, for other files of
            the same moment.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: Callable[[int], bool],
        before_write: Callable[[dict[str, Any]], None],
    ) -> None:
        self._folder, self._keep, self._before_write = folder, keep, before_write
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[dict[str, Any], Future[None]] | None = None

    def submit(self, state: dict[str, Any]) -> None:
        """Hands `state` to the thread, which writes it.

        Args:
            state: Tensors, numbers and strings in dicts and lists, with `state["step"]`.

        Raises:
            Exception: the state before could not be written, other than by an OSError.
        """
        if distributed.rank() != 0:
            return
        if (failed := self._failed()) is not None:
            _warn(*failed, "training goes on")
        copied = _on_cpu(state)
        self._pending = copied, self._thread.submit(self._write, copied)

    def close(self, *, finished: bool) -> bool:
        """Waits for the last checkpoint; returns whether it is on disk.

        If the run has `finished` and the disk did not take it, tries again for a minute.

        Raises:
            OSError: the run has finished, and its checkpoint could not be written.
        """
        try:
            for tries_left in reversed(range(LAST_TRIES)):
                if (failed := self._failed()) is None:
                    return True
                if not finished:
                    _warn(*failed, "the same command goes on from the one before")
                    return False
                _warn(*failed, f"trying again in {PAUSE_S:g} s, {tries_left + 1} times at most")
                time.sleep(PAUSE_S)
                state = failed[0]
                self._pending = state, self._thread.submit(self._write, state)
            if (failed := self._failed()) is not None:
                raise _for_good(*failed)
            return True
        finally:
            self._thread.shutdown()

    def _failed(self) -> tuple[dict[str, Any], OSError] | None:
        """The state that was being written, and why the disk did not take it; waits for it."""
        if self._pending is None:
            return None
        (state, future), self._pending = self._pending, None
        try:
            future.result()
        except OSError as error:
            return state, error
        return None

    def _write(self, state: dict[str, Any]) -> None:
        self._before_write(state)
        with atomic_write(self._folder / "checkpoints" / f"step_{state['step']:08d}.pt") as file:
            torch.save({**state, "content_hash": content_hash(state)}, file)
        steps = _checkpoints(self._folder)
        for path in [path for path, step in steps.items() if not self._keep(step)][KEEP:]:
            path.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, with tensors on the CPU; None if there is none.

    Raises:
        ValueError: there are checkpoints, and none of them can be read.
        OSError: the newest may be whole, but cannot be reached now, or memory is short.
    """
    paths = list(_checkpoints(folder))
    for path in paths:
        try:
            return _read(path)
        except Exception as error:  # broken bytes raise errors of nearly every kind
            reason = str(error).partition("\n")[0]
            if lacks_memory(error):
                raise OSError(
                    errno.ENOMEM,
                    f"too little memory to read the checkpoint, which may be whole ({reason}); "
                    "free or ask for more memory, and type the same command again",
                    os.fspath(path),
                ) from error
            if isinstance(error, OSError) and error.errno not in OF_CONTENT:
                raise
            log.warning(
                "checkpoint %s is damaged (%s); trying the one before",
                path,
                reason or type(error).__name__,
            )
    if paths:
        raise ValueError(
            f"none of the checkpoints in {folder / 'checkpoints'} can be read; put back good "
            "copies, or move that folder away to start anew"
        )
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    """Path of the newest checkpoint, readable or not."""
    return next(iter(_checkpoints(folder)), None)


def content_hash(state: dict[str, Any]) -> str:
    """SHA-256 over the whole state: keys, numbers, and the tensors' formats, shapes and bytes."""
    digest = hashlib.sha256()
    for key, value in _flat(state):
        if isinstance(value, Tensor):
            digest.update(f"{key}: {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{key}: {value!r}\n".encode())
    return digest.hexdigest()


def _warn(state: dict[str, Any], error: OSError, consequence: str) -> None:
    log.warning(
        "could not write the checkpoint of step %d (%s); %s", state["step"], error, consequence
    )


def _for_good(state: dict[str, Any], error: OSError) -> OSError:
    """The error of a run whose last checkpoint the disk does not take."""
    return OSError(
        error.errno,
        f"{error.strerror}: the checkpoint of step {state['step']}, the last one, is not written; "
        "make room or let the disk be written to, and type the same command again: it goes on from "
        "the checkpoint before",
        error.filename,
    )


def _read(path: Path) -> dict[str, Any]:
    check_sums(path)
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    if state.pop("content_hash") != content_hash(state):
        raise ValueError("its content hash differs")
    return state


def _checkpoints(folder: Path) -> dict[Path, int]:
    """Number of steps by path, newest first."""
    files = (folder / "checkpoints").glob("step_*.pt")
    steps = {
        path: int(match[1])
        for path in files
        if (match := re.fullmatch(r"step_(\d{8,})\.pt", path.name))
    }
    return {path: steps[path] for path in sorted(steps, key=steps.__getitem__, reverse=True)}


def _on_cpu(value: Any) -> Any:
    """A copy that training does not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    return [_on_cpu(inner) for inner in value] if isinstance(value, list) else value


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(inner, f"{key}/{name!r}")
    else:
        yield key, value
