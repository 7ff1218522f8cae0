"""The worker processes that make batches of images."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from seed_exp.base import slurm
from seed_exp.data.batch import B, Batch, HostHalf
from seed_exp.data.sources import Source
from seed_exp.data.stall_warning import Watch
from seed_exp.data.transfer import lock_pages, on_gpu, unlock_pages

_MAX_SLICE = 16  # images that a worker reads at once: enough for vectorised draws, few enough to hold them all decoded
_MAX_BAD_RUN = 10_000  # images passed over in search of a good one: a disk that is gone must not be looked through to its end
_CPU = torch.device("cpu")


def default_num_workers(ranks_on_machine: int) -> int:
    """Worker processes for each rank: its share of the cores this process may use, less one for the rank itself; >= 0."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    own = slurm.cores_of_task(cores)
    return max(0, (cores // ranks_on_machine if own is None else own) - 1)


def load_batches(
    source: Source,
    views: HostHalf[B],
    order: Iterable[tuple[int, NDArray[np.int64]]],
    *,
    num_workers: int,
    device: torch.device = _CPU,
    on_bad: Callable[[int, str], None] | None = None,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Generator[B, None, None]:
    """Yields what `views` makes of each `(epoch, indices)` of `order`, in that order, on the device.

    A batch is valid until the next one is asked for. The workers write into three batches of shared memory, page-locked if
    they go to a GPU: while one is in use, the next two are being made. However many workers there are, that is all that they
    share (232 MiB for 256 images in 224 + 6 x 96); each one holds up to 16 decoded images of its own.

    An image that cannot be read may be replaced by the next one of the source that can, with its label, index and draws: the
    batches then depend on nothing but source and order, as ever. While a batch is waited for longer than a minute, the log says
    what the workers are reading.

    Args:
        source: Where the images come from.
        views: The host half of their views.
        order: May be endless; it is read ahead by two batches. None is larger than the first. The workers live as long as
            the iteration and stop when the returned iterator is closed.
        num_workers: Processes; 0 = in this one.
        device: Where the batches are wanted.
        on_bad: Called here with number and error of each image that cannot be read, once, before the first batch in which it is
            replaced is yielded; what it raises ends the iteration. None: such an image is an error.
        waiting: Entered while this process waits for a batch to be made, or makes it; not while it waits for the GPU.

    Raises:
        ValueError: what a source or `views` found wrong, with its own message, also from a worker; no image, or 10,000 in
            succession, can be read; or there is too little shared memory.
        RuntimeError: a worker was killed.
    """
    with closing(_host_batches(source, views, order, num_workers, device, on_bad)) as batches:
        timed = _timed(batches, waiting)
        yield from on_gpu(timed, device) if device.type == "cuda" else timed


def _timed(
    batches: Iterator[B], waiting: Callable[[], AbstractContextManager[None]]
) -> Iterator[B]:
    while True:
        with waiting():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


class _Slice(NamedTuple):
    """A part of a batch, the work of one worker."""

    epoch: int
    indices: NDArray[np.int64]
    row: int
    """Of the ring, where it begins."""


class _Done(NamedTuple):
    """What a worker gives back."""

    part: _Slice
    bad: list[tuple[int, str]]
    """Images that it found it cannot read, and why."""
    error: ValueError | None
    """Why the slice was not made; raised in the worker, it would come out with the worker's traceback as its message."""


def _host_batches(
    source: Source,
    views: HostHalf[B],
    order: Iterable[tuple[int, NDArray[np.int64]]],
    num_workers: int,
    device: torch.device,
    on_bad: Callable[[int, str], None] | None,
) -> Generator[B, None, None]:
    """The batches, in a ring of buffers that workers fill slice by slice.

    Why no batch is overwritten while it is in use: DataLoader gives the slices back in order and, for each, sends out one
    new one, so that W workers with prefetch factor P have the next P x W slices. P x W is at most the slices of two
    batches. When the last slice of batch b has come and the batch is yielded, the workers have slices up to batch b + 2; the
    first of batch b + 3, which gets the buffer of b, is sent when b + 1 is asked for.
    """
    order = iter(order)
    first = next(order, None)
    if first is None:
        return
    batch_size = len(first[1])
    num_workers = min(num_workers, batch_size)
    num_slices = -(
        -batch_size // min(_MAX_SLICE, batch_size // max(num_workers, 1))
    )  # at least one for each worker
    num_buffers = 3 if num_workers else 1
    ring = views.empty(num_buffers * batch_size)
    reading = torch.full((max(num_workers, 1),), -1)
    if num_workers:
        ring, reading = ring.map(_shared), _shared(reading)
    loader: DataLoader[_Done] = DataLoader(
        _Slices(source, views, ring, reading, skip_bad=on_bad is not None),
        batch_size=None,
        sampler=_slices(chain([first], order), batch_size, num_slices, num_buffers),
        num_workers=num_workers,
        prefetch_factor=2 * num_slices // num_workers if num_workers else None,
        collate_fn=_unchanged,  # type: ignore[arg-type]
        worker_init_fn=_ignore_signals,
    )
    locked = lock_pages(ring) if num_workers and device.type == "cuda" else []
    known_bad: set[int] = set()
    watch = Watch(source, reading, num_workers)
    try:
        with closing(watch):
            for number, (part, bad, error) in enumerate(watch.over(loader)):
                for index, message in bad:
                    if (
                        on_bad is not None and index not in known_bad
                    ):  # another worker may have met it before
                        known_bad.add(index)
                        on_bad(index, message)
                if error is not None:
                    raise error
                if number % num_slices == 0:
                    start = part.row
                if number % num_slices == num_slices - 1:
                    rows = slice(start, part.row + len(part.indices))
                    with watch.paused():
                        yield ring.map(itemgetter(rows))._replace(epoch=part.epoch)
    finally:
        for worker in (
            watch.workers
        ):  # DataLoader has asked them to end; one that is stuck in a read ignores it
            if worker.is_alive():
                worker.kill()
        unlock_pages(locked)


def _slices(
    order: Iterable[tuple[int, NDArray[np.int64]]],
    batch_size: int,
    num_slices: int,
    num_buffers: int,
) -> Iterator[_Slice]:
    """Equal parts of each batch, the same number whatever its size, and their places in the ring."""
    for number, (epoch, indices) in enumerate(order):
        assert len(indices) <= batch_size
        row = number % num_buffers * batch_size
        for part in np.array_split(indices, num_slices):
            yield _Slice(epoch, part, row)
            row += len(part)


class _Slices(Dataset[_Done]):
    """In a worker: fills the rows of a slice."""

    def __init__(
        self, source: Source, views: HostHalf[Any], ring: Batch, reading: Tensor, *, skip_bad: bool
    ) -> None:
        self.source, self.views, self.ring = source, views, ring
        self.reading, self.skip_bad = reading, skip_bad
        self.known_bad: set[int] = set()

    def __getitem__(self, part: _Slice) -> _Done:
        rows = slice(part.row, part.row + len(part.indices))
        bad: list[tuple[int, str]] = []
        try:
            images, indices = [], part.indices.copy()
            for row, index in enumerate(part.indices.tolist()):
                image, indices[row] = self._read(index, bad)
                images.append(image)
            labels = self.source.labels
            known = (
                np.full(len(indices), -1, np.int64)
                if labels is None
                else np.asarray(labels[indices], np.int64)
            )
            self.views.host(images, known, part.epoch, indices, self.ring.map(itemgetter(rows)))
        except ValueError as error:
            return _Done(part, bad, error)
        return _Done(part, bad, None)

    def _read(self, index: int, bad: list[tuple[int, str]]) -> tuple[Tensor, int]:
        """Image `index`, or the next one that can be read, and its number; what is found unreadable is added to `bad`."""
        info = get_worker_info()
        worker = 0 if info is None else info.id
        num_tries = min(len(self.source), _MAX_BAD_RUN)
        for candidate in ((index + step) % len(self.source) for step in range(num_tries)):
            if candidate in self.known_bad:
                continue
            self.reading[worker] = candidate
            try:
                return self.source.image(candidate), candidate
            except ValueError as error:
                if not self.skip_bad:
                    raise
                bad.append((candidate, str(error)))
                self.known_bad.add(candidate)
            finally:
                self.reading[worker] = -1
        which = (
            "none of them"
            if num_tries == len(self.source)
            else f"none of {num_tries} in succession from number {index} on"
        )
        last = f", the last: {bad[-1][1]}" if bad else ""
        raise ValueError(f"of {len(self.source)} images {which} can be read{last}")


def _shared(tensor: Tensor) -> Tensor:
    try:
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(
            f"no room for {tensor.nbytes / 2**20:.0f} MiB in shared memory ({error}); enlarge /dev/shm (docker run --shm-size), "
            "take a smaller batch_size, or data.num_workers=0"
        ) from error
    return tensor


def _unchanged(done: _Done) -> _Done:
    return done


def _ignore_signals(_worker: int) -> None:
    # Ctrl-C and a scheduler's warnings reach all processes of a job; the parent ends its workers when it has made its checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
