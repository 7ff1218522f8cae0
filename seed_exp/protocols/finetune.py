"""Fine-tuning of a run's students on labels."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from seed_exp.config.schema import FinetuneConfig
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine import distributed
from seed_exp.evaluation.accuracy import top_accuracy
from seed_exp.evaluation.features import run_extractor
from seed_exp.evaluation.results import with_best
from seed_exp.evaluation.setup import eval_options, load_frozen, load_labelled
from seed_exp.methods.finetuning import Finetune
from seed_exp.protocols.supervised import (
    Evaluated,
    Measures,
    open_evaluation,
    train_and_measure,
    with_shared_batch_norm,
    write_measures,
)
from seed_exp.views.recipe import TrainViews

log = logging.getLogger("seed_exp")


def finetune(config: FinetuneConfig) -> Measures:
    """Fine-tunes and evaluates, prints a table, writes results/finetune-*.json into the run folder.

    Returns:
        {<student>/lr<rate>: {"top1": percent, "top5": percent}}, and under each student's own name
        its best rate's. "Best" is by validation accuracy, so with several rates it is slightly
        optimistic. Rates that diverged are left out.
    """
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        frozen = load_frozen(Path(config.run), config.networks, device)
        sources = load_labelled(config.data)
        evaluated = Evaluated(frozen, sources.train, sources.val)
        with open_evaluation("finetune", config, evaluated, device) as run:
            log.info("%d training images, %d classes", len(sources.train), sources.num_classes)
            if eval_options(config.views) != eval_options(frozen.views):
                log.warning(
                    "the run was trained for %s, views=%s are others",
                    eval_options(frozen.views),
                    config.views.name,
                )
            method = Finetune(
                frozen.students,
                config.lrs,
                config.classifier_lr_factor,
                sources.num_classes,
                config.seed,
            )
            method.trainable = {
                name: with_shared_batch_norm(network, device)
                for name, network in method.trainable.items()
            }
            extract = run_extractor(run)

            def accuracy(names: Collection[str]) -> Measures:
                networks = {name: method.trainable[name].eval() for name in names}
                found = extract(networks, sources.val, evenly_spaced(len(sources.val)))
                return {
                    name: top_accuracy(logits, found.labels)
                    for name, logits in found.features.items()
                }

            measured = train_and_measure(
                run,
                evaluated,
                method,
                TrainViews(config.views, config.seed),
                accuracy,
                lrs={name: lr * config.optimizer.lr for name, lr in method.lrs.items()},
                summary=with_best,
            )
            return write_measures(
                run,
                evaluated,
                measured,
                title="fine-tuning",
                protocol={"best_lr_chosen_on": "val"},
                bn_per_rank=device.type != "cuda",
            )
