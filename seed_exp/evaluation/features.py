"""Pooled features of frozen encoders for the images of a source; evaluations compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from seed_exp.config.schema import Precision
from seed_exp.data.loader import load_batches
from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.engine.precision import autocast
from seed_exp.engine.run import Run
from seed_exp.views.recipe import EvalViews


class Extracted(NamedTuple):
    """Features of images, float32 and int64 on the CPU; on other ranks than 0 nothing."""

    features: dict[str, Tensor]
    """[n, num_features] by encoder."""
    labels: Tensor
    """[n], -1 = unlabelled."""
    indices: Tensor
    """Images that were read [n]: where one could not be, the number of the one in its place."""


@dataclass(frozen=True)
class Extractor:
    """Computes features in the same way for bank, queries and every encoder."""

    views: EvalViews
    """Views of the images that the encoders see."""
    device: torch.device
    """Device of the encoders."""
    num_workers: int
    """Worker processes per rank that read images."""
    batch_size: int = 256
    """Images per forward pass of each process."""
    precision: Precision = Precision.auto
    """Precision of the forward pass."""
    bad_samples: Callable[[Source], Callable[[int, str], None]] | None = None
    """Returns `on_bad` of `load_batches` for a source; None = an unreadable image is an error."""

    @torch.no_grad()
    def __call__(
        self,
        encoders: Mapping[str, Callable[[Tensor], Tensor]],
        source: Source,
        indices: NDArray[np.int64],
    ) -> Extracted:
        """Features of images by every encoder; each image is read only once.

        Several processes share the work; rank 0 gets the result. The caller has set the encoders to
        evaluation mode.

        Args:
            encoders: Functions from images [N, 3, S, S] to features [N, num_features], by name.
            source: The source of the images.
            indices: Indices [n] of the images in the source.

        Returns:
            Features, labels and indices on the CPU, in the order of `indices`; empty on other ranks
            than 0.
        """
        kept = len(indices) if distributed.rank() == 0 else 0
        features: dict[str, Tensor] = {}
        facts = torch.empty(kept, 2, dtype=torch.int64)  # label and number of each image
        done = 0
        on_bad = None if self.bad_samples is None else self.bad_samples(source)
        order = [(0, batch_indices) for batch_indices in self._rounds(indices)]
        with closing(
            load_batches(
                source,
                self.views,
                order,
                num_workers=self.num_workers,
                device=self.device,
                on_bad=on_bad,
            )
        ) as batches:
            hidden = None if kept else True  # None: shown only on a terminal
            for batch in tqdm(
                batches, "features", len(order), leave=False, unit="batch", disable=hidden
            ):
                images = self.views.device(batch)["global"][0]
                for name, encoder in encoders.items():
                    with autocast(self.precision, self.device):
                        own = encoder(images).float()
                    gathered = distributed.all_gather(own)
                    if kept:
                        # One tensor for all: parts and their concatenation would need twice the
                        # memory.
                        if name not in features:
                            features[name] = torch.empty(kept, gathered.shape[1])
                        features[name][done : done + len(gathered)] = gathered[: kept - done]
                gathered = distributed.all_gather(torch.stack([batch.labels, batch.indices], 1))
                if kept:
                    facts[done : done + len(gathered)] = gathered[: kept - done]
                done += len(gathered)
        return Extracted(features, *facts.T.contiguous())

    def _rounds(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Indices of this rank's images for each forward pass.

        The last pass repeats an image where needed, so that all ranks have equally many.
        """
        ranks = distributed.world_size()
        rounds = []
        for start in range(0, len(indices), self.batch_size * ranks):
            together = indices[start : start + self.batch_size * ranks]
            together = np.concatenate([together, np.repeat(together[-1:], -len(together) % ranks)])
            rounds.append(np.split(together, ranks)[distributed.rank()])
        return rounds


def is_finite(features: Tensor) -> bool:
    """Whether all features are finite; those of a network that has diverged are not."""
    # In parts: those of ImageNet are gigabytes.
    parts = features.split(2**16)  # type: ignore[no-untyped-call]
    return all(bool(rows.isfinite().all()) for rows in parts)


def run_extractor(run: Run[Any]) -> Extractor:
    """An extractor with a run's views, device, workers and precision.

    The run lists the images that it cannot read.
    """
    return Extractor(
        EvalViews(run.config.views),
        run.device,
        run.num_workers,
        precision=run.config.precision,
        bad_samples=run.bad_samples,
    )
