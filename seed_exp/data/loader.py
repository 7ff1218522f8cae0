"""The worker processes that make batches of images."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
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
from seed_exp.data.transfer import lock_pages, prefetch_to_gpu, unlock_pages

# Images that a worker reads at once: enough for vectorised draws, few enough to keep all decoded.
_MAX_SLICE = 16
# Bytes of decoded images that a worker collects before it makes their views: memory does not grow
# with the size of photographs.
_MAX_DECODED = 1 << 28
# Images skipped in search of a readable one: nobody wants to wait for all images of a lost disk.
_MAX_BAD_RUN = 10_000
_CPU = torch.device("cpu")

# Epoch and images of a batch, and what gives it its shape.
_Shaped = tuple[tuple[int, NDArray[np.int64]], Callable[[B], B] | None]


def default_num_workers(ranks_on_machine: int) -> int:
    """Worker processes per rank: its share of the usable cores, less one for the rank; >= 0."""
    return max(0, cores_of_rank(ranks_on_machine) - 1)


def cores_of_rank(ranks_on_machine: int) -> int:
    """A rank's share of the usable cores of this machine, or what SLURM gives its task."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    own = slurm.cores_of_task(cores)
    return cores // ranks_on_machine if own is None else own


def load_batches(
    source: Source,
    views: HostHalf[B],
    order: Iterable[tuple[int, NDArray[np.int64]]],
    *,
    num_workers: int,
    device: torch.device = _CPU,
    on_bad: Callable[[int, str], None] | None = None,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    shapes: Iterable[Callable[[B], B]] | None = None,
) -> Generator[B, None, None]:
    """Yields one batch of views on `device` for each `(epoch, indices)` of `order`, in that order.

    A batch is valid until the next one is asked for. The workers write into three batches of shared
    memory, page-locked if they go to a GPU: while one is in use, the next two are being made. This
    is all the memory that the workers share, however many there are (232 MiB for 256 images in
    224 + 6 x 96); each worker holds up to 16 decoded images of its own, 256 MiB and one image at
    most.

    An unreadable image may be replaced by the next readable one of the source, with that image's
    label, index and draws: the batches still depend on nothing but source and order. If a batch
    takes longer than a minute, the log says what the workers are reading.

    Args:
        source: The source of the images.
        views: The host half of their views.
        order: Epoch and image indices of each batch. It may be endless, is read ahead by two
            batches, and no batch may be larger than the first. The workers live as long as the
            iteration and stop when the returned iterator is closed.
        num_workers: Worker processes; 0 = this process makes the batches itself.
        device: Device of the batches.
        on_bad: Called in this process with index and error of each unreadable image, once, before
            the first batch in which it is replaced is yielded; an exception from it ends the
            iteration. None = such an image is an error.
        waiting: Entered while this process waits for a batch or makes it; not while it waits for
            the GPU.
        shapes: For each batch of `order`, what gives a batch of `views.empty` its shape, in the
            same memory: batches of views of many sizes have room for the largest. Picklable. None =
            all batches have the shape that they come with.

    Raises:
        ValueError: the source or `views` raised it, here or in a worker (the message is kept); all
            images, or 10,000 in succession, are unreadable; or there is too little shared memory.
        RuntimeError: a worker was killed.
    """
    shaped: Iterable[_Shaped[B]] = (
        ((item, None) for item in order) if shapes is None else zip(order, shapes, strict=True)
    )
    with closing(_host_batches(source, views, shaped, num_workers, device, on_bad)) as batches:
        timed = _timed(batches, waiting)
        yield from prefetch_to_gpu(timed, device) if device.type == "cuda" else timed


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
    buffer: slice
    """Rows of the batch in the ring."""
    row: int
    """First row of the slice in its batch."""
    shape: Callable[[Any], Any] | None
    """What gives the batch its shape; None = it has it."""

    def room(self, ring: B) -> B:
        """The batch, of which the slice is a part."""
        batch = ring.map(itemgetter(self.buffer))
        return batch if self.shape is None else self.shape(batch)


class _Done(NamedTuple):
    """The result of a worker for one slice."""

    part: _Slice
    bad: list[tuple[int, str]]
    """Index and error of each image that this worker newly found unreadable."""
    error: ValueError | None
    """Why the slice was not made.

    It is not raised in the worker, because DataLoader would put the traceback into its message.
    """


def _host_batches(
    source: Source,
    views: HostHalf[B],
    order: Iterable[_Shaped[B]],
    num_workers: int,
    device: torch.device,
    on_bad: Callable[[int, str], None] | None,
) -> Generator[B, None, None]:
    """Yields the batches, which workers fill slice by slice in a ring of buffers.

    No batch is overwritten while it is in use, for this reason: DataLoader returns the slices in
    order and sends out a new one for each, so W workers with prefetch factor P have the next P x W
    slices. P x W is at most the number of slices in two batches. When the last slice of batch b has
    come and the batch is yielded, the workers have slices up to batch b + 2. The first slice of
    batch b + 3, which gets the buffer of b, is sent when b + 1 is asked for.
    """
    order = iter(order)
    first = next(order, None)
    if first is None:
        return
    batch_size = len(first[0][1])
    num_workers = min(num_workers, batch_size)
    # At least one slice for each worker.
    num_slices = -(-batch_size // min(_MAX_SLICE, batch_size // max(num_workers, 1)))
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
        worker_init_fn=partial(
            _begin_worker, os.getpid(), multiprocessing.get_start_method() == "forkserver"
        ),
    )
    locked: list[Tensor] = []
    known_bad: set[int] = set()
    watch = Watch(source, reading, num_workers)
    try:
        with closing(watch):
            for number, (part, bad, error) in enumerate(watch.over(loader)):
                # Not before the workers have been forked: CUDA does not promise that a fork can
                # use pages that its parent has locked.
                if number == 0 and num_workers and device.type == "cuda":
                    locked = lock_pages(ring)
                for index, message in bad:
                    # Another worker may have reported it before.
                    if on_bad is not None and index not in known_bad:
                        known_bad.add(index)
                        on_bad(index, message)
                if error is not None:
                    raise error
                if number % num_slices == num_slices - 1:
                    with watch.paused():
                        yield part.room(ring)._replace(epoch=part.epoch)
    finally:
        # DataLoader has asked the workers to end; one that is stuck in a read ignores it.
        for worker in watch.workers:
            if worker.is_alive():
                worker.kill()
        unlock_pages(locked)


def _slices(
    order: Iterable[_Shaped[B]],
    batch_size: int,
    num_slices: int,
    num_buffers: int,
) -> Iterator[_Slice]:
    """Yields `num_slices` equal slices of each batch, with their places in the ring."""
    for number, ((epoch, indices), shape) in enumerate(order):
        assert len(indices) <= batch_size
        start, row = number % num_buffers * batch_size, 0
        for part in np.array_split(indices, num_slices):
            yield _Slice(epoch, part, slice(start, start + len(indices)), row, shape)
            row += len(part)


class _Slices(Dataset[_Done]):
    """Fills the rows of a slice; runs in a worker."""

    def __init__(
        self, source: Source, views: HostHalf[Any], ring: Batch, reading: Tensor, *, skip_bad: bool
    ) -> None:
        self.source, self.views, self.ring = source, views, ring
        self.reading, self.skip_bad = reading, skip_bad
        self.known_bad: set[int] = set()

    def __getitem__(self, part: _Slice) -> _Done:
        bad: list[tuple[int, str]] = []
        images: list[Tensor] = []
        found: list[int] = []
        room, start = part.room(self.ring), part.row
        try:
            for index in part.indices.tolist():
                image, read = self._read(index, bad)
                images.append(image)
                found.append(read)
                if sum(one.nbytes for one in images) > _MAX_DECODED:
                    self._fill(room, start, part.epoch, images, found)
                    start += len(found)
                    images, found = [], []
            if found or not len(part.indices):
                self._fill(room, start, part.epoch, images, found)
        except ValueError as error:
            return _Done(part, bad, error)
        return _Done(part, bad, None)

    def _fill(
        self, room: Batch, start: int, epoch: int, images: list[Tensor], found: list[int]
    ) -> None:
        """Writes the views of images `found` into the rows of `room` from `start` on."""
        indices = np.array(found, np.int64)
        labels = self.source.labels
        known = (
            np.full(len(indices), -1, np.int64)
            if labels is None
            else np.asarray(labels[indices], np.int64)
        )
        rows = slice(start, start + len(indices))
        self.views.host(images, known, epoch, indices, room.map(itemgetter(rows)))

    def _read(self, index: int, bad: list[tuple[int, str]]) -> tuple[Tensor, int]:
        """Image `index`, or else the next readable one, and its index.

        Images that turn out unreadable are added to `bad`.
        """
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
            f"no room for {tensor.nbytes / 2**20:.0f} MiB in shared memory ({error}); "
            "enlarge /dev/shm (docker run --shm-size), "
            "take a smaller batch_size, or data.num_workers=0"
        ) from error
    return tensor


def _unchanged(done: _Done) -> _Done:
    return done


def _begin_worker(parent: int, by_server: bool, _worker: int) -> None:
    """Ends a worker whose parent was killed before it began; leaves signals to the parent."""
    # torch's own watch takes the parent that it finds for the right one, and would wait forever.
    # The parent of a fork server's child is the server, so only its sentinel tells of the creator.
    # A forked worker's sentinel is held open by its siblings, so only its parent's number tells.
    creator = multiprocessing.parent_process()
    if not (creator and creator.is_alive() if by_server else os.getppid() == parent):
        os._exit(1)
    # Ctrl-C and a scheduler's warnings reach all processes of a job; the parent ends its workers
    # after it has written its checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
