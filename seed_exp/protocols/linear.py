"""Linear evaluation of a run's students."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from seed_exp.config.schema import LinearConfig
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine import distributed
from seed_exp.evaluation.accuracy import linear_accuracy
from seed_exp.evaluation.features import Extractor
from seed_exp.evaluation.results import with_best
from seed_exp.evaluation.setup import (
    bad_samples_of,
    eval_options,
    load_frozen,
    load_labelled,
    num_workers_of,
)
from seed_exp.methods.linear_probe import LinearProbe
from seed_exp.models.students import Student
from seed_exp.protocols.supervised import Evaluation, Measures
from seed_exp.views.recipe import EvalViews, TrainViews


def linear(config: LinearConfig) -> Measures:
    """Evaluates, prints a table, writes results/linear-*.json into the run folder.

    Returns:
        {<student>/lr<rate>: {"top1": percent, "top5": percent}}, and under each student's own name its best rate's. "Best" is
        by validation accuracy, so with several rates it is slightly optimistic. Rates that diverged are left out.
    """
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        frozen, sources = (
            load_frozen(Path(config.run), config.networks, device),
            load_labelled(config.data),
        )
        if eval_options(config.views) != eval_options(frozen.views):
            raise ValueError(
                f"views={config.views.name} evaluates with {eval_options(config.views)}, but the run was trained for "
                f"{eval_options(frozen.views)}; choose fitting views, e.g. views=linear_digits, or set these options"
            )
        evaluation = Evaluation("linear", config, frozen, sources.train, sources.val, device)
        folder = evaluation.open()
        encoders: dict[str, nn.Module] = {
            name: _Features(student) for name, student in frozen.students.items()
        }
        probe = LinearProbe(encoders, config.lrs, sources.num_classes, config.seed)
        bad_samples = bad_samples_of(config.data, folder)
        num_workers = num_workers_of(config.data)
        extract = Extractor(
            EvalViews(config.views),
            device,
            num_workers,
            precision=config.precision,
            bad_samples=bad_samples,
        )

        def accuracy(names: Collection[str]) -> Measures:
            features, labels, _ = extract(encoders, sources.val, evenly_spaced(len(sources.val)))
            if distributed.rank() != 0:
                return {}
            return linear_accuracy(
                {name: probe.trainable[name] for name in names}, features, labels
            )

        return evaluation.run(
            folder,
            probe,
            TrainViews(config.views, config.seed),
            accuracy,
            bad_samples,
            title="linear evaluation",
            bn_per_rank=False,
            protocol={"best_lr_chosen_on": "val"},
            lrs={classifier: lr * config.optimizer.lr for classifier, lr in probe.lrs.items()},
            summary=with_best,
        )


class _Features(nn.Module):
    """A student's encoder without its head."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.encoder, self.num_features = student.encoder, student.num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.encoder(images)
        return features
