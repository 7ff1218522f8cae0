"""Warnings while a batch takes long."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import TypeVar

from torch import Tensor

from seed_exp.data.sources import Source

# Seconds of waiting for a batch after which a warning says what is being read, again and again.
_STALL_SECONDS = 60.0

log = logging.getLogger("seed_exp")

T = TypeVar("T")


class Watch:
    """Warns, from its own thread, while the iteration over a loader waits for long.

    Args:
        source: The source that the workers read.
        reading: Index of the image that each worker is reading [max(num_workers, 1)], -1 = none.
        num_workers: Worker processes; 0 = the loader reads in this process.
    """

    def __init__(self, source: Source, reading: Tensor, num_workers: int) -> None:
        self._source, self._reading, self._num_workers = source, reading, num_workers
        self._names: dict[int, list[str]] = {}
        self._waiting_since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="seed_exp data watch")
        self.workers: set[BaseProcess] = set()
        """The loader's worker processes."""

    def over(self, loader: Iterable[T]) -> Iterator[T]:
        """An iterator over the loader; waiting for it is watched from now on."""
        others = set(multiprocessing.active_children())
        parts = iter(loader)
        self.workers = set(multiprocessing.active_children()) - others
        self._thread.start()  # after the workers have been forked
        self._waiting_since = time.monotonic()
        return parts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the watch while the block runs: the work between two batches."""
        self._waiting_since = None
        yield
        self._waiting_since = time.monotonic()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        since, num_warnings = None, 0
        while not self._closed.wait(_STALL_SECONDS / 20):
            if since != self._waiting_since:
                since, num_warnings = self._waiting_since, 0
            if since is not None and time.monotonic() - since >= _STALL_SECONDS * (
                num_warnings + 1
            ):
                num_warnings += 1
                log.warning(
                    "waiting for data for %.0f s; %s", time.monotonic() - since, self._activity()
                )

    def _activity(self) -> str:
        """Says which image each worker is reading."""
        images = {
            worker: index for worker, index in enumerate(self._reading.tolist()) if index != -1
        }
        if self._num_workers == 0:
            return f"reading {self._name(images[0])}" if images else "no image is being read"
        found = ", ".join(
            f"worker {worker} is reading {self._name(index)}" for worker, index in images.items()
        )
        return found or "no worker is reading an image"

    def _name(self, index: int) -> str:
        # The key may lie in the very file that cannot be read at the moment.
        if index not in self._names:
            self._names[index] = found = []
            finder = threading.Thread(
                target=lambda: found.append(self._source.key(index)), daemon=True
            )
            finder.start()
            finder.join(1)
        return (
            f"{self._names[index][0]} (number {index})"
            if self._names[index]
            else f"image number {index}"
        )
