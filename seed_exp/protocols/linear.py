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
from seed_exp.evaluation.features import run_extractor
from seed_exp.evaluation.recalibration import recalibrate_batch_norm
from seed_exp.evaluation.results import with_best
from seed_exp.evaluation.setup import eval_options, load_frozen, load_labelled
from seed_exp.methods.linear_probe import LinearProbe
from seed_exp.models.students import Student
from seed_exp.protocols.supervised import (
    Evaluated,
    Measures,
    open_evaluation,
    train_and_measure,
    write_measures,
)
from seed_exp.views.recipe import TrainViews


def linear(config: LinearConfig) -> Measures:
    """Evaluates, prints a table, writes results/linear-*.json into the run folder.

    Returns:
        {<student>/lr<rate>: {"top1": percent, "top5": percent}}, and under each student's own name
        its best rate's. "Best" is by validation accuracy, so with several rates it is slightly
        optimistic. Rates that diverged are left out.
    """
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        frozen = load_frozen(Path(config.run), config.networks, device)
        sources = load_labelled(config.data)
        if eval_options(config.views) != eval_options(frozen.views):
            raise ValueError(
                f"views={config.views.name} evaluates with {eval_options(config.views)}, but the "
                f"run was trained for {eval_options(frozen.views)}; leave out "
                f"views={config.views.name} and these options: the run's own are the default"
            )
        evaluated = Evaluated(frozen, sources.train, sources.val)
        with open_evaluation("linear", config, evaluated, device) as run:
            encoders: dict[str, nn.Module] = {
                name: _Features(student) for name, student in frozen.students.items()
            }
            probe = LinearProbe(encoders, config.lrs, sources.num_classes, config.seed)
            extract = run_extractor(run)
            protocol = {"best_lr_chosen_on": "val"}
            if config.recalibrate_bn:
                protocol["recalibrate_bn"] = recalibrate_batch_norm(
                    encoders, extract, sources.train
                )

            def accuracy(names: Collection[str]) -> Measures:
                found = extract(encoders, sources.val, evenly_spaced(len(sources.val)))
                if distributed.rank() != 0:
                    return {}
                classifiers = {name: probe.trainable[name] for name in names}
                return linear_accuracy(classifiers, found.features, found.labels)

            measured = train_and_measure(
                run,
                evaluated,
                probe,
                TrainViews(config.views, config.seed),
                accuracy,
                lrs={name: lr * config.optimizer.lr for name, lr in probe.lrs.items()},
                summary=with_best,
            )
            return write_measures(
                run,
                evaluated,
                measured,
                title="linear evaluation",
                protocol=protocol,
                bn_per_rank=False,
            )


class _Features(nn.Module):
    """A student's encoder without its head."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.encoder, self.num_features = student.encoder, student.num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.encoder(images)
        return features
