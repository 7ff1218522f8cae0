"""Which images make up which step, and the worker processes that fetch them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seed_exp.data.sources import Source

T = TypeVar("T")


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
    make: Callable[[Sequence[Tensor], NDArray[np.int64], int, NDArray[np.int64]], T],
    order: Iterable[tuple[int, NDArray[np.int64]]],
    *,
    num_workers: int,
    pin_memory: bool = False,
) -> Generator[T, None, None]:
    """Yields `make(images, labels, epoch, indices)` for each `(epoch, indices)` of `order`, in that order.

    Args:
        source: Where the images come from.
        make: Called once per batch in a worker process; images are uint8 [3, H, W] of any size, labels [N], -1 = none.
        order: May be endless; it is read ahead by two items per worker. The workers live as long as the iteration and stop
            when the returned iterator is closed.
        num_workers: Processes; 0 = in this one.
        pin_memory: Whether tensors are moved to page-locked memory, for faster copies to a GPU.

    Raises:
        ValueError: what a source or `make` found wrong, with its own message, also from a worker.
    """
    loader = DataLoader(
        _Batches(source, make),
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_interrupt,
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        yield batch


class _Batches(Dataset[T | ValueError], Generic[T]):
    def __init__(self, source: Source, make: Callable[[Sequence[Tensor], NDArray[np.int64], int, NDArray[np.int64]], T]) -> None:
        self.source, self.make = source, make

    def __getitem__(self, item: tuple[int, NDArray[np.int64]]) -> T | ValueError:
        epoch, indices = item
        try:
            images = [self.source.image(index) for index in indices.tolist()]
            labels = self.source.labels
            batch_labels = np.full(len(indices), -1, np.int64) if labels is None else np.asarray(labels[indices], np.int64)
            return self.make(images, batch_labels, epoch, indices)
        except ValueError as error:
            return error  # raised in a worker, it would come out with the worker's whole traceback as its message


def _unchanged(batch: T) -> T:
    return batch


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C reaches the whole process group; the parent ends its workers, without a traceback from each.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
