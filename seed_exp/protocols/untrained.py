"""Steps of the evaluations that train nothing: they compare features of frozen encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_exp.base.table import markdown_table
from seed_exp.config.schema import FeaturesConfig
from seed_exp.data.sources import Source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine.precision import resolve
from seed_exp.engine.run import list_bad_samples, num_workers_of
from seed_exp.evaluation.features import Extracted, Extractor, is_finite
from seed_exp.evaluation.recalibration import recalibrate_batch_norm
from seed_exp.evaluation.results import WrittenMeasures, run_home, write_results
from seed_exp.evaluation.setup import (
    FrozenRun,
    LabelledSources,
    eval_options,
    load_frozen,
    load_labelled,
)
from seed_exp.views.recipe import EvalViews


@dataclass(frozen=True)
class FrozenFeatures:
    """The frozen encoders of a run, labelled images, and how features are computed of them."""

    frozen: FrozenRun
    sources: LabelledSources
    extractor: Extractor
    protocol: dict[str, Any]
    """Everything besides the images that the features depend on."""

    def __call__(self, source: Source) -> Extracted:
        """Features of all images of the source, by student; on other ranks than 0 nothing."""
        encoders = {name: student.features for name, student in self.frozen.students.items()}
        return self.extractor(encoders, source, evenly_spaced(len(source)))


def frozen_features(config: FeaturesConfig, device: torch.device) -> FrozenFeatures:
    """Loads the run's students and the images; measures batch norm anew if that is asked for.

    Raises:
        ValueError: as `load_frozen` and `load_labelled`.
    """
    run = Path(config.run)
    frozen, sources = load_frozen(run, config.networks, device), load_labelled(config.data)
    extract = Extractor(
        EvalViews(frozen.views),
        device,
        num_workers_of(config.data),
        config.batch_size,
        config.precision,
        list_bad_samples(config.data, run_home(run)),
    )
    protocol: dict[str, Any] = {
        "features": "pooled encoder output, cosine similarity",
        "views": eval_options(frozen.views),
        "precision": resolve(config.precision, device).value,
        "students": frozen.record,
    }
    if config.recalibrate_bn:
        networks = {name: student.encoder for name, student in frozen.students.items()}
        protocol["recalibrate_bn"] = recalibrate_batch_norm(networks, extract, sources.train)
    return FrozenFeatures(frozen, sources, extract, protocol)


def diverged_among(*features: Mapping[str, Tensor]) -> list[str]:
    """Names of the students with a feature that is not finite.

    Raises:
        ValueError: all have one.
    """
    names = list(features[0])
    diverged = [name for name in names if not all(is_finite(of[name]) for of in features)]
    if len(diverged) == len(names):
        raise ValueError(
            f"the features of {', '.join(diverged)} are not finite: the training has diverged; "
            "train with a lower optimizer.lr or with optimizer.clip_grad_norm=1"
        )
    return diverged


def write_numbers(
    command: str,
    title: str,
    run: Path,
    protocol: dict[str, Any],
    results: dict[str, dict[str, float]],
    diverged: list[str],
) -> WrittenMeasures:
    """The results, printed and written to results/<command>-*.json in the run."""
    if diverged:
        protocol = {**protocol, "diverged": diverged}
    path = write_results(run_home(run), command, protocol, results)
    measures = list(next(iter(results.values())))
    rows = [
        [name, *(f"{numbers[measure]:.2f}" for measure in measures)]
        for name, numbers in results.items()
    ]
    rows += [[name, *("diverged" for _ in measures)] for name in diverged]
    print(markdown_table([f"{title}, %", *measures], rows))
    print(f"written to {path}")
    return WrittenMeasures(results, path)
