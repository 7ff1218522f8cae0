"""Fine-tuning of the students of a run on labels: semi-supervised learning with few of them, transfer to other images.

  python -m seed_exp.finetune run=runs/distill/NAME data.fraction=0.1                       10 % of the labels in SEED_DATA
  python -m seed_exp.finetune run=runs/distill/NAME data.subset=1percent.txt                images that a list names
  python -m seed_exp.finetune run=runs/distill/NAME data=torchvision data.name=CIFAR10      transfer
  python -m seed_exp.finetune run=runs/distill/NAME data=digits views=linear_digits

The whole student is trained, with a new classifier in place of its head; a copy of it for each learning rate, all side by side in
one pass over the images. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from seed_exp.config.command import command
from seed_exp.config.schema import FinetuneConfig
from seed_exp.engine import distributed
from seed_exp.engine.fit import fit
from seed_exp.engine.precision import resolve
from seed_exp.engine.run_folder import decisive_options, hold, log_to, open_run, to_plain
from seed_exp.engine.tracking import RunFacts, build_tracker
from seed_exp.evaluation.features import Extractor, spread
from seed_exp.evaluation.finetune import top_accuracy
from seed_exp.evaluation.frozen import bad_samples_of, eval_options, load_frozen, load_labelled, num_workers_of
from seed_exp.evaluation.results import run_home, with_best, write_results
from seed_exp.methods.finetune import Finetune
from seed_exp.reporting.table import markdown_table
from seed_exp.views.recipe import EvalViews, TrainViews

Accuracies = dict[str, dict[str, float]]

log = logging.getLogger("seed_exp")


def finetune(config: FinetuneConfig) -> Accuracies:
    """Fine-tunes and evaluates, prints a table, writes results/finetune-*.json into the run folder.

    Returns:
        {<student>/lr<rate>: {"top1": percent, "top5": percent}}, and under each student's own name its best rate's. "Best" is
        by validation accuracy, so with several rates it is slightly optimistic. Rates that diverged are left out.
    """
    run = Path(config.run)
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        frozen, sources = load_frozen(run, config.networks, device), load_labelled(config.data)
        label = "+".join(frozen.students)
        inputs = {"train": sources.train.fingerprint(), "val": sources.val.fingerprint()}
        inputs |= {name: record["sha256"] for name, record in frozen.record.items()}
        folder = open_run("finetune", label, config, inputs, run_home(run) / "finetune")
        log_to(folder)
        log.info("%d training images, %d classes", len(sources.train), sources.num_classes)
        if eval_options(config.views) != eval_options(frozen.views):
            log.warning("the run was trained for %s, views=%s are others", eval_options(frozen.views), config.views.name)
        method = Finetune(frozen.students, config.lrs, config.classifier_lr_factor, sources.num_classes, config.seed)
        num_workers = num_workers_of(config.data)
        bad_samples = bad_samples_of(config.data, folder)
        extract = Extractor(EvalViews(config.views), device, num_workers, precision=config.precision, bad_samples=bad_samples)

        def accuracy(names: Collection[str]) -> Accuracies:
            networks = {name: method.trainable[name].eval() for name in names}
            logits, labels = extract(networks, sources.val, spread(len(sources.val)))
            return {name: top_accuracy(logits[name], labels) for name in logits}

        last: Accuracies | None = None

        def evaluate(names: Collection[str]) -> dict[str, float]:
            nonlocal last
            last = accuracy(names)
            return {f"{name}/{key}": value for name, values in last.items() for key, value in values.items()}

        tracked = RunFacts("finetune", label, list(frozen.students), to_plain(config))
        with hold(folder), build_tracker(folder, config.tracker, tracked) as tracker:
            diverged = fit(
                method,
                sources.train,
                TrainViews(config.views, config.seed),
                config,
                folder=folder,
                tracker=tracker,
                device=device,
                num_workers=num_workers,
                evaluate=evaluate,
                on_checkpoint=lambda _, __: None,
                on_bad=None if bad_samples is None else bad_samples(sources.train),
                lrs={name: lr * config.optimizer.lr for name, lr in method.lrs.items()},
            )
            if last is None:  # it was finished, and is called again
                last = accuracy([name for name in method.lrs if name not in diverged])
            results = with_best(last)
            rows = [[name, value["top1"], value["top5"]] for name, value in results.items()]
            tracker.log_table("finetune", ["network", "top1", "top5"], rows)
        if distributed.rank() != 0:
            return results
        protocol = {
            "options": {key: value for key, value in decisive_options(to_plain(config)).items() if key != "run"},
            "precision": resolve(config.precision, device).value,
            "best_lr_chosen_on": "val",
            "diverged": sorted(diverged),
            "train": sources.train.fingerprint(),
            "val": sources.val.fingerprint(),
            "students": frozen.record,
        }
        path = write_results(run_home(run), "finetune", protocol, results)
    lines = [[name, f"{value['top1']:.2f}", f"{value['top5']:.2f}"] for name, value in results.items()]
    lines += [[name, "diverged", "diverged"] for name in diverged]
    print(markdown_table(["fine-tuning, %", "top-1", "top-5"], lines))
    print(f"written to {path}")
    return results


main = command(finetune)

if __name__ == "__main__":
    main()
