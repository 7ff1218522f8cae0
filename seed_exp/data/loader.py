"""Which images make up which step, and the worker processes that make batches of them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from multiprocessing.process import BaseProcess
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from seed_exp.data.sources import Source

_MAX_SLICE = 16  # images that a worker reads at once: enough for vectorised draws, few enough to hold them all decoded
_MAX_BAD_RUN = 10_000  # images passed over in search of a good one: a disk that is gone must not be looked through to its end
_STALL_SECONDS = 60.0  # of waiting for a batch after which, and from then on every so often, a warning says what is being read
_CPU = torch.device("cpu")

log = logging.getLogger("seed_exp")


class Batch(Protocol):
    """A named tuple of tensors with one row per image, and the epoch that they belong to."""

    @property
    def indices(self) -> Tensor: ...

    def map(self: B, function: Callable[[Tensor], Tensor]) -> B:
        """The batch with `function` applied to each of its tensors."""
        ...

    def _replace(self: B, *, epoch: int = ..., indices: Tensor = ...) -> B: ...


B = TypeVar("B", bound=Batch)


class HostHalf(Protocol[B]):
    """What makes batches of images; picklable."""

    def empty(self, num: int) -> B:
        """Room for `num` images."""
        ...

    def host(self, images: Sequence[Tensor], labels: NDArray[np.int64], epoch: int, indices: NDArray[np.int64], out: B) -> None:
        """Fills `out` from images, uint8 [3, H, W] of any sizes, and labels [N], -1 = none."""
        ...


class SampleOrder:
    """The images of every step: each epoch is a new permutation, its incomplete last batch is left out.

    A pure function of the arguments: no state but a cache. The global batches do not depend on the number of processes.

    Args:
        num_samples: Images in the source.
        batch_size: Images per step over all processes.
        seed: Any integer; with the epoch it keys the permutation.
        rank, world_size: This process and how many there are; each takes an equal, contiguous part of each batch.

    Raises:
        ValueError: `batch_size` exceeds `num_samples` or does not divide by `world_size`.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size={batch_size} does not divide by the {world_size} processes; take a multiple")
        if batch_size > num_samples:
            raise ValueError(f"batch_size={batch_size} exceeds the {num_samples} images; take batch_size={num_samples} or less")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.batch_size_per_rank = rank, batch_size // world_size
        self.steps_per_epoch = num_samples // batch_size
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch of `step` (both from 0) and this rank's images [batch_size / world_size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size + self.rank * self.batch_size_per_rank
        return epoch, self._permutation(epoch)[start : start + self.batch_size_per_rank]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[0] != epoch:
            # Sorted random words and not Generator.permutation, whose result may change with NumPy's version.
            key = np.array([self.seed % 2**64, epoch], np.uint64)
            words = np.random.Philox(key=key).random_raw(self.num_samples)
            self._cached = epoch, np.argsort(words, kind="stable")
        return self._cached[1]


def default_num_workers(ranks_on_machine: int) -> int:
    """Worker processes for each rank: its share of the cores this process may use, less one for the rank itself; >= 0."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(0, cores // ranks_on_machine - 1)


def load_batches(
    source: Source,
    views: HostHalf[B],
    order: Iterable[tuple[int, NDArray[np.int64]]],
    *,
    num_workers: int,
    device: torch.device = _CPU,
    on_bad: Callable[[int, str], None] | None = None,
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

    Raises:
        ValueError: what a source or `views` found wrong, with its own message, also from a worker; no image, or 10,000 in
            succession, can be read; or there is too little shared memory.
        RuntimeError: a worker was killed.
    """
    order = iter(order)
    first = next(order, None)
    if first is None:
        return
    with closing(_host_batches(source, views, chain([first], order), len(first[1]), num_workers, device, on_bad)) as batches:
        yield from _on_gpu(batches, device) if device.type == "cuda" else batches


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
    batch_size: int,
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
    num_workers = min(num_workers, batch_size)
    num_slices = -(-batch_size // min(_MAX_SLICE, batch_size // max(num_workers, 1)))  # at least one for each worker
    num_buffers = 3 if num_workers else 1
    ring = views.empty(num_buffers * batch_size)
    reading = torch.full((max(num_workers, 1),), -1)
    if num_workers:
        ring, reading = ring.map(_shared), _shared(reading)
    loader: DataLoader[_Done] = DataLoader(
        _Slices(source, views, ring, reading, skip_bad=on_bad is not None),
        batch_size=None,
        sampler=_slices(order, batch_size, num_slices, num_buffers),
        num_workers=num_workers,
        prefetch_factor=2 * num_slices // num_workers if num_workers else None,
        collate_fn=_unchanged,  # type: ignore[arg-type]
        worker_init_fn=_ignore_signals,
    )
    page_locked = num_workers > 0 and device.type == "cuda"
    if page_locked:
        ring.map(_lock_pages)
    known_bad: set[int] = set()
    watch = _Watch(source, reading, num_workers)
    try:
        with closing(watch):
            for number, (part, bad, error) in enumerate(watch.over(loader)):
                for index, message in bad:
                    if on_bad is not None and index not in known_bad:  # another worker may have met it before
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
        for worker in watch.workers:  # DataLoader has asked them to end; one that is stuck in a read ignores it
            if worker.is_alive():
                worker.kill()
        if page_locked:
            ring.map(_unlock_pages)


def _slices(
    order: Iterable[tuple[int, NDArray[np.int64]]], batch_size: int, num_slices: int, num_buffers: int
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

    def __init__(self, source: Source, views: HostHalf[Any], ring: Batch, reading: Tensor, *, skip_bad: bool) -> None:
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
            known = np.full(len(indices), -1, np.int64) if labels is None else np.asarray(labels[indices], np.int64)
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
        which = "none of them" if num_tries == len(self.source) else f"none of {num_tries} in succession from number {index} on"
        last = f", the last: {bad[-1][1]}" if bad else ""
        raise ValueError(f"of {len(self.source)} images {which} can be read{last}")


class _Watch:
    """Warns, from a thread of its own, while the iteration over a loader has been waiting for long."""

    def __init__(self, source: Source, reading: Tensor, num_workers: int) -> None:
        self._source, self._reading, self._num_workers = source, reading, num_workers
        self._names: dict[int, list[str]] = {}
        self._waiting_since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="seed_exp data watch")
        self.workers: set[BaseProcess] = set()
        """Those of the loader."""

    def over(self, loader: Iterable[_Done]) -> Iterator[_Done]:
        """What the loader gives; the time it takes is watched."""
        others = set(multiprocessing.active_children())
        parts = iter(loader)
        self.workers = set(multiprocessing.active_children()) - others
        self._thread.start()  # after the workers have been forked
        self._waiting_since = time.monotonic()
        return parts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what happens between two batches."""
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
            if since is not None and time.monotonic() - since >= _STALL_SECONDS * (num_warnings + 1):
                num_warnings += 1
                log.warning("waiting for data for %.0f s; %s", time.monotonic() - since, self._what())

    def _what(self) -> str:
        """Which image each worker is reading."""
        images = {worker: index for worker, index in enumerate(self._reading.tolist()) if index != -1}
        if self._num_workers == 0:
            return f"reading {self._name(images[0])}" if images else "no image is being read"
        found = ", ".join(f"worker {worker} is reading {self._name(index)}" for worker, index in images.items())
        return found or "no worker is reading an image"

    def _name(self, index: int) -> str:
        # The key may lie in the very file that cannot be read at the moment.
        if index not in self._names:
            self._names[index] = found = []
            finder = threading.Thread(target=lambda: found.append(self._source.key(index)), daemon=True)
            finder.start()
            finder.join(1)
        return f"{self._names[index][0]} (number {index})" if self._names[index] else f"image number {index}"


def _on_gpu(batches: Iterable[B], device: torch.device) -> Generator[B, None, None]:
    """The batches, copied on a stream of its own while the GPU is still busy with the step before.

    Two at most are on the GPU: the host waits for the last step but one before it has another batch copied.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    in_use: deque[tuple[B, torch.cuda.Event]] = deque()
    try:
        for batch in batches:
            with torch.cuda.stream(stream):
                moved = batch.map(lambda tensor: tensor.to(device, non_blocking=True))._replace(indices=batch.indices)
            copied = stream.record_event()
            torch.cuda.current_stream(device).wait_event(copied)
            yield moved
            # All that reads the batch has been queued. Its memory belongs to the copying stream, which does not know of
            # these readers, so it is kept until they are done.
            in_use.append((moved, torch.cuda.current_stream(device).record_event()))
            if len(in_use) == 2:
                in_use.popleft()[1].synchronize()
            copied.synchronize()  # before the workers get the host's buffer back
    finally:
        torch.cuda.synchronize(device)


def _shared(tensor: Tensor) -> Tensor:
    try:
        tensor.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(
            f"no room for {tensor.nbytes / 2**20:.0f} MiB in shared memory ({error}); enlarge /dev/shm (docker run --shm-size), "
            "take a smaller batch_size, or data.num_workers=0"
        ) from error
    return tensor


def _lock_pages(tensor: Tensor) -> Tensor:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))  # type: ignore[no-untyped-call]
    return tensor


def _unlock_pages(tensor: Tensor) -> Tensor:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()))  # type: ignore[no-untyped-call]
    return tensor


def _unchanged(done: _Done) -> _Done:
    return done


def _ignore_signals(_worker: int) -> None:
    # Ctrl-C and a scheduler's warnings reach all processes of a job; the parent ends its workers when it has made its checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
