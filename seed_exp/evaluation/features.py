"""What evaluations compare: the pooled features of frozen encoders, for the images of a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

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
    """How features are made, the same for bank, queries and every encoder."""

    views: EvalViews
    device: torch.device
    num_workers: int
    batch_size: int = 256
    """Images per forward pass of each process."""
    precision: Precision = Precision.auto
    bad_samples: Callable[[Source], Callable[[int, str], None]] | None = None
    """Makes for a source what is told of its images that cannot be read; None = they are errors."""

    @torch.no_grad()
    def __call__(
        self,
        encoders: Mapping[str, Callable[[Tensor], Tensor]],
        source: Source,
        indices: NDArray[np.int64],
    ) -> Extracted:
        """Features of the images `indices` [n] of `source`, in that order, by every encoder.

        Each image is read once for all encoders. Several processes share the work; the first one
        gets the result. The caller has set the encoders to evaluation mode.
        """
        kept = len(indices) if distributed.rank() == 0 else 0
        features: dict[str, Tensor] = {}
        facts = torch.empty(kept, 2, dtype=torch.int64)  # label and number of each image
        done = 0
        on_bad = None if self.bad_samples is None else self.bad_samples(source)
        order = [(0, mine) for mine in self._rounds(indices)]
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
            hidden = None if kept else True  # None: shown on a terminal only
            for batch in tqdm(
                batches, "features", len(order), leave=False, unit="batch", disable=hidden
            ):
                images = self.views.device(batch)["global"][0]
                for name, encoder in encoders.items():
                    with autocast(self.precision, self.device):
                        mine = encoder(images).float()
                    everyones = distributed.all_gather(mine)
                    if kept:
                        if name not in features:
                            # Once, whole: parts and a concatenation would take twice the memory.
                            features[name] = torch.empty(kept, everyones.shape[1])
                        features[name][done : done + len(everyones)] = everyones[: kept - done]
                everyones = distributed.all_gather(torch.stack([batch.labels, batch.indices], 1))
                if kept:
                    facts[done : done + len(everyones)] = everyones[: kept - done]
                done += len(everyones)
        return Extracted(features, *facts.T.contiguous())

    def _rounds(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """This rank's images of each forward pass; the last is padded to be equal."""
        ranks = distributed.world_size()
        rounds = []
        for start in range(0, len(indices), self.batch_size * ranks):
            together = indices[start : start + self.batch_size * ranks]
            together = np.concatenate([together, np.repeat(together[-1:], -len(together) % ranks)])
            rounds.append(np.split(together, ranks)[distributed.rank()])
        return rounds
