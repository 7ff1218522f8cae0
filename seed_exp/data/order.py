"""The images of each training step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def refuse_large_batch(batch_size: int | str, num_samples: int) -> None:
    """Checks that there are as many images as a batch has; `auto` finds a number that fits.

    Raises:
        ValueError: there are fewer.
    """
    if isinstance(batch_size, int) and batch_size > num_samples:
        raise ValueError(
            f"batch_size={batch_size} exceeds the {num_samples} images; "
            f"take batch_size={num_samples} or less"
        )


class SampleOrder:
    """The images of every step: each epoch is a new permutation, without the incomplete last batch.

    A pure function of the arguments: no state but a cache. The global batches do not depend on the
    number of processes.

    Args:
        num_samples: Images in the source.
        batch_size: Images per step over all processes.
        seed: Any integer; with the epoch it keys the permutation.
        rank, world_size: This process and how many there are; each takes an equal, contiguous part
            of each batch.

    Raises:
        ValueError: `batch_size` exceeds `num_samples` or does not divide by `world_size`.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"batch_size={batch_size} does not divide by the {world_size} processes; "
                "take a multiple"
            )
        refuse_large_batch(batch_size, num_samples)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.batch_size_per_rank = rank, batch_size // world_size
        self.steps_per_epoch = num_samples // batch_size
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def batch(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch of `step` (both from 0) and this rank's images [batch_size / world_size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size + self.rank * self.batch_size_per_rank
        return epoch, self._permutation(epoch)[start : start + self.batch_size_per_rank]

    def neighbours(self, epoch: int, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """The other image of each image's pair [N]; the last of an odd number is its own.

        Images 0 and 1 of the epoch's order are a pair, 2 and 3, and so on.
        """
        order = self._permutation(epoch)
        places = np.argsort(order)[images]
        neighbours: NDArray[np.int64] = order[np.minimum(places ^ 1, len(order) - 1)]
        return neighbours

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[0] != epoch:
            # Sorted random words and not Generator.permutation, whose result may change with
            # NumPy's version.
            key = np.array([self.seed % 2**64, epoch], np.uint64)
            words = np.random.Philox(key=key).random_raw(self.num_samples)
            self._cached = epoch, np.argsort(words, kind="stable")
        return self._cached[1]
