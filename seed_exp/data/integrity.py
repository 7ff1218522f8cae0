"""Checks that every image of a source can be read, and counts what the source holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from seed_exp.data.loader import load_batches
from seed_exp.data.sources import Source

_BATCH_SIZE = 256


@dataclass(frozen=True)
class Inventory:
    """Findings about a source of n images."""

    bad: dict[int, str]
    """Index of each image that cannot be read, and the reason."""
    sizes: NDArray[np.int64]
    """Height and width in pixels of each readable image [n - len(bad), 2]."""
    num_copies: int
    """Readable images whose file has the same bytes as an earlier one."""
    class_sizes: NDArray[np.int64] | None
    """Images per class, over the classes that have any; None if the source is unlabelled."""
    content: str
    """SHA-256, hexadecimal, of all files and labels in their order, but not of names.

    It is the same for a copy, also in another layout. A file that cannot be read counts as empty.
    """


def take_inventory(source: Source, *, num_workers: int) -> Inventory:
    """Findings after reading and decoding every image in `num_workers` processes; shows progress.

    Takes 32 bytes of memory per image.
    """
    sizes, hashes = np.zeros((len(source), 2), np.int64), np.zeros((len(source), 2), np.int64)
    bad: dict[int, str] = {}
    order = (
        (0, np.arange(start, min(start + _BATCH_SIZE, len(source))))
        for start in range(0, len(source), _BATCH_SIZE)
    )
    batches = load_batches(_Tolerant(source), _Measure(source), order, num_workers=num_workers)
    with closing(batches), tqdm(total=len(source), desc="verifying", unit="img") as progress:
        for batch in batches:
            indices = batch.indices.numpy()
            sizes[indices], hashes[indices] = batch.sizes.numpy(), batch.hashes.numpy()
            for index in indices[sizes[indices, 0] == 0].tolist():
                bad[index] = _reason(source, index)
            progress.set_postfix(bad=len(bad), refresh=False)
            progress.update(len(indices))
    good = sizes[:, 0] > 0
    labels = None if source.labels is None else np.asarray(source.labels)
    return Inventory(
        bad,
        sizes[good],
        int(good.sum()) - len(np.unique(hashes[good], axis=0)),
        None if labels is None else np.unique(labels[labels >= 0], return_counts=True)[1],
        _content(hashes, labels),
    )


def _content(hashes: NDArray[np.int64], labels: NDArray[np.int64] | None) -> str:
    digest = hashlib.sha256(hashes.astype("<i8").tobytes())
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()


class _Batch(NamedTuple):
    sizes: Tensor
    hashes: Tensor
    indices: Tensor
    epoch: int

    def map(self, function: Callable[[Tensor], Tensor]) -> _Batch:
        return _Batch(
            function(self.sizes), function(self.hashes), function(self.indices), self.epoch
        )


class _Tolerant:
    """A source in which an unreadable image is an image without pixels."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.labels, self.key, self.encoded, self.fingerprint = (
            source.labels,
            source.key,
            source.encoded,
            source.fingerprint,
        )

    def __len__(self) -> int:
        return len(self._source)

    def image(self, index: int) -> Tensor:
        try:
            return self._source.image(index)
        except ValueError:
            return torch.empty(3, 0, 0, dtype=torch.uint8)


class _Measure:
    """Takes the place of views: measures image sizes and hashes image files."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def empty(self, num: int) -> _Batch:
        sizes, hashes, indices = (
            torch.empty(num, *rest, dtype=torch.int64) for rest in ([2], [2], [])
        )
        return _Batch(sizes, hashes, indices, epoch=0)

    def host(
        self,
        images: Sequence[Tensor],
        labels: NDArray[np.int64],  # noqa: ARG002
        epoch: int,  # noqa: ARG002
        indices: NDArray[np.int64],
        out: _Batch,
    ) -> None:
        for row, (image, index) in enumerate(zip(images, indices.tolist(), strict=True)):
            out.sizes[row] = torch.tensor(image.shape[1:])
            try:
                data = self._source.encoded(index)
            except ValueError:
                data = b""
            digest = hashlib.blake2b(data, digest_size=16).digest()
            out.hashes[row] = torch.from_numpy(np.frombuffer(digest, "<i8").astype(np.int64))
        out.indices.copy_(torch.from_numpy(indices))


def _reason(source: Source, index: int) -> str:
    try:
        source.image(index)
    except ValueError as error:
        return str(error)
    return f"image {source.key(index)!r} could only be read at the second try"
