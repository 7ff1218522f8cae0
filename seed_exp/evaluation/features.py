"""What evaluations compare: the pooled features of frozen encoders, for the images of a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

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
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Features of the images `indices` [n] of `source` by every encoder, each image read once for all of them.

        Several processes share the work; the first one gets the result. The caller has set the encoders to evaluation mode.

        Returns:
            Features [n, num_features] by name and labels [n] (-1 = unlabelled), float32 and int64 on the CPU, in the order of
            `indices`; on other ranks than 0 neither names nor labels.
        """
        kept = len(indices) if distributed.rank() == 0 else 0
        features: dict[str, Tensor] = {}
        labels = torch.empty(kept, dtype=torch.int64)
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
                        if (
                            name not in features
                        ):  # once, whole: parts and their concatenation would take twice the memory
                            features[name] = torch.empty(kept, everyones.shape[1])
                        features[name][done : done + len(everyones)] = everyones[: kept - done]
                everyones = distributed.all_gather(batch.labels)
                if kept:
                    labels[done : done + len(everyones)] = everyones[: kept - done]
                done += len(everyones)
        return features, labels

    def _rounds(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """This rank's images of each forward pass; the last one is filled up so that all ranks have equally many."""
        ranks = distributed.world_size()
        rounds = []
        for start in range(0, len(indices), self.batch_size * ranks):
            together = indices[start : start + self.batch_size * ranks]
            together = np.concatenate([together, np.repeat(together[-1:], -len(together) % ranks)])
            rounds.append(np.split(together, ranks)[distributed.rank()])
        return rounds


def run_extractor(run: Run[Any]) -> Extractor:
    """An extractor with a run's views, device, workers and precision, whose unreadable images the run lists."""
    return Extractor(
        EvalViews(run.config.views),
        run.device,
        run.num_workers,
        precision=run.config.precision,
        bad_samples=run.bad_samples,
    )
