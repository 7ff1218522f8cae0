"""Linear evaluation of the students of a run: a classifier on frozen features (the protocol of MoCo, arXiv:1911.05722).

  python -m seed_exp.linear run=runs/distill/NAME                              images: the folder in SEED_DATA
  python -m seed_exp.linear run=runs/distill/NAME 'lrs=[30]'                   the paper's learning rate only
  python -m seed_exp.linear run=runs/distill/NAME data=digits views=linear_digits

All learning rates of all students are trained side by side in one pass over the images. Interrupted, it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn

from seed_exp.config.command import command
from seed_exp.config.schema import LinearConfig
from seed_exp.engine import distributed
from seed_exp.engine.fit import fit
from seed_exp.engine.precision import resolve
from seed_exp.engine.run_folder import decisive_options, hold, log_to, open_run, to_plain
from seed_exp.engine.tracking import RunFacts, build_tracker
from seed_exp.evaluation.features import Extractor, spread
from seed_exp.evaluation.frozen import bad_samples_of, eval_options, load_frozen, load_labelled, num_workers_of
from seed_exp.evaluation.linear import linear_accuracy
from seed_exp.evaluation.results import run_home, with_best, write_results
from seed_exp.methods.linear import LinearProbe
from seed_exp.models.students import Student
from seed_exp.reporting.table import markdown_table
from seed_exp.views.recipe import EvalViews, TrainViews

Accuracies = dict[str, dict[str, float]]


def linear(config: LinearConfig) -> Accuracies:
    """Evaluates, prints a table, writes results/linear-*.json into the run folder.

    Returns:
        {<student>/lr<rate>: {"top1": percent, "top5": percent}}, and under each student's own name its best rate's. "Best" is
        by validation accuracy, so with several rates it is slightly optimistic. Rates that diverged are left out.
    """
    run = Path(config.run)
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        frozen, sources = load_frozen(run, config.networks, device), load_labelled(config.data)
        if eval_options(config.views) != eval_options(frozen.views):
            raise ValueError(
                f"views={config.views.name} evaluates with {eval_options(config.views)}, but the run was trained for "
                f"{eval_options(frozen.views)}; choose fitting views, e.g. views=linear_digits, or set these options"
            )
        inputs = {"train": sources.train.fingerprint(), "val": sources.val.fingerprint()}
        inputs |= {name: record["sha256"] for name, record in frozen.record.items()}
        folder = open_run("linear", "+".join(frozen.students), config, inputs, run_home(run) / "linear")
        log_to(folder)
        encoders: dict[str, nn.Module] = {name: _Features(student) for name, student in frozen.students.items()}
        probe = LinearProbe(encoders, config.lrs, sources.num_classes, config.seed)
        num_workers = num_workers_of(config.data)
        bad_samples = bad_samples_of(config.data, folder)
        extract = Extractor(EvalViews(config.views), device, num_workers, precision=config.precision, bad_samples=bad_samples)

        def accuracy(names: Collection[str]) -> Accuracies:
            features, labels = extract(encoders, sources.val, spread(len(sources.val)))
            if distributed.rank() != 0:
                return {}
            return linear_accuracy({name: probe.trainable[name] for name in names}, features, labels)

        last: Accuracies | None = None

        def evaluate(names: Collection[str]) -> dict[str, float]:
            nonlocal last
            last = accuracy(names)
            return {f"{name}/{key}": value for name, values in last.items() for key, value in values.items()}

        tracked = RunFacts("linear", "+".join(frozen.students), list(frozen.students), to_plain(config))
        with hold(folder), build_tracker(folder, config.tracker, tracked) as tracker:
            diverged = fit(
                probe,
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
                lrs={classifier: lr * config.optimizer.lr for classifier, lr in probe.lrs.items()},
            )
            if last is None:  # it was finished, and is called again
                last = accuracy([name for name in probe.lrs if name not in diverged])
            results = with_best(last)
            rows = [[name, value["top1"], value["top5"]] for name, value in results.items()]
            tracker.log_table("linear", ["classifier", "top1", "top5"], rows)
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
        path = write_results(run_home(run), "linear", protocol, results)
    lines = [[name, f"{value['top1']:.2f}", f"{value['top5']:.2f}"] for name, value in results.items()]
    lines += [[name, "diverged", "diverged"] for name in diverged]
    print(markdown_table(["linear evaluation, %", "top-1", "top-5"], lines))
    print(f"written to {path}")
    return results


class _Features(nn.Module):
    """A student's encoder without its head."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.encoder, self.num_features = student.encoder, student.num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.encoder(images)
        return features


main = command(linear)

if __name__ == "__main__":
    main()
