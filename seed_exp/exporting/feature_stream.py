"""Features of a source of any size, part by part, each with the number of its image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.data.decode import decode
from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.evaluation.features import Extractor

_FIRST_PART = 2048
# Workers start anew for each part: so long that it costs nothing, so short that one sees it go on.
_PART_SECONDS = 20
_MAX_PART_BYTES = 256 * 2**20


class Part(NamedTuple):
    """Features of some images of a source."""

    indices: NDArray[np.int64]
    """Numbers of the images in the source [n], ascending; unreadable ones are missing."""
    features: dict[str, Tensor]
    """[n, D] by network, float32 on the CPU; on other ranks than 0 of a process group nothing."""
    done: int
    """Images of the source up to the end of this part, unreadable ones included."""


def feature_parts(
    extract: Extractor, networks: Mapping[str, Callable[[Tensor], Tensor]], source: Source
) -> Iterator[Part]:
    """Features of all images of `source` by every network, in parts of about 20 seconds.

    Memory does not depend on the number of images. All ranks of a process group iterate together.
    An image that cannot be read is left out, or is an error, as `extract.bad_samples` says.
    """
    start, size = 0, _FIRST_PART
    while start < len(source):
        began = time.perf_counter()
        indices = np.arange(start, min(start + size, len(source)), dtype=np.int64)
        features, _, read = extract(networks, source, indices)
        start += len(indices)
        if features:
            good = read.numpy() == indices
            yield Part(indices[good], {name: rows[good] for name, rows in features.items()}, start)
        else:
            yield Part(indices[:0], {}, start)
        longest = (
            _MAX_PART_BYTES // (4 * sum(rows.shape[1] for rows in features.values()))
            if features
            else len(source)
        )
        rate = len(indices) / (time.perf_counter() - began)
        size = min(distributed.gather_objects(max(1, min(longest, int(_PART_SECONDS * rate)))))


class FilesSource:
    """Single image files, without labels."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        self.labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W]."""
        return decode(self.encoded(index), self.files[index])

    def encoded(self, index: int) -> bytes:
        """The file of image `index`."""
        try:
            return Path(self.files[index]).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read image {self.files[index]}: {error.strerror}") from error

    def key(self, index: int) -> str:
        """Path of image `index`, as it was given."""
        return self.files[index]

    def fingerprint(self) -> str:
        """The paths."""
        return f"files:{self.files}"
