"""Networks on a run's students, trained with labels and measured on other images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from seed_exp.base.table import markdown_table
from seed_exp.config.identity import identity
from seed_exp.config.options import decisive_options, to_plain
from seed_exp.config.schema import DetectConfig, FinetuneConfig, LinearConfig, SegmentConfig
from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.engine.fit import Fitted, fit
from seed_exp.engine.method import Method
from seed_exp.engine.precision import resolve
from seed_exp.engine.run import Run, open_run
from seed_exp.evaluation.results import WrittenMeasures, run_home, write_results
from seed_exp.evaluation.setup import FrozenRun
from seed_exp.views.recipe import Views

C = TypeVar("C", bound=LinearConfig | FinetuneConfig | DetectConfig | SegmentConfig)
Measures = dict[str, dict[str, float]]
"""Numbers in percent by name, for each network."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation's students, and the images they are trained and measured on."""

    frozen: FrozenRun
    train: Source
    val: Source


class Measured(NamedTuple):
    """The end of an evaluation's training."""

    results: Measures
    fitted: Fitted


def open_evaluation(
    command: str, config: C, evaluated: Evaluated, device: torch.device
) -> AbstractContextManager[Run[C]]:
    """The run of an evaluation, whose folder is in that of the run it evaluates; as `open_run`."""
    students = evaluated.frozen.record
    inputs = {"train": evaluated.train.fingerprint(), "val": evaluated.val.fingerprint()}
    inputs |= {name: record["sha256"] for name, record in students.items()}
    root = run_home(Path(config.run)) / command
    return open_run(command, "+".join(students), config, inputs, device, root)


def with_shared_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, whose batch norm takes its statistics over all processes if they have GPUs.

    As in the published protocols: SwAV's of few labels, MoCo's of detection.
    """
    if distributed.world_size() == 1 or device.type != "cuda":
        return network
    shared: nn.Module = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return shared


def train_and_measure(
    run: Run[C],
    evaluated: Evaluated,
    method: Method,
    views: Views,
    measure: Callable[[Collection[str]], Measures],
    *,
    lrs: Mapping[str, float] | None = None,
    summary: Callable[[Measures], Measures] = dict,
) -> Measured:
    """Trains `method` on the training images and measures its networks.

    Args:
        run: Where they train.
        evaluated: Students and images.
        method: What to train.
        views: The training images' views.
        measure: Measures the networks of these names; on other ranks than 0 it may give nothing.
        lrs: As in `fit`.
        summary: Selects the measures to show.

    Returns:
        The summary, without networks that diverged.
    """
    last: Measures | None = None

    def measured(names: Collection[str]) -> Measures:
        # Otherwise every size of a batch would be compiled, also the last one's.
        with torch.compiler.set_stance("force_eager"):
            return measure(names)

    def evaluate(names: Collection[str]) -> dict[str, float]:
        nonlocal last
        last = measured(names)
        return {
            f"{name}/{key}": value for name, values in last.items() for key, value in values.items()
        }

    with run.tracked(list(evaluated.frozen.students)) as tracker:
        fitted = fit(
            method,
            evaluated.train,
            views,
            run,
            evaluate=evaluate,
            on_checkpoint=lambda *_: None,
            lrs=lrs,
        )
        if last is None:  # it was finished, and is called again
            last = measured([name for name in method.trainable if name not in fitted.diverged])
        results = summary({name: row for name, row in last.items() if name not in fitted.diverged})
        columns = list(next(iter(results.values()), {}))
        rows = [[name, *row.values()] for name, row in results.items()]
        tracker.log_table(run.command, ["network", *columns], rows)
    return Measured(results, fitted)


def write_measures(
    run: Run[C],
    evaluated: Evaluated,
    measured: Measured,
    *,
    title: str,
    protocol: Mapping[str, Any],
    bn_per_rank: bool,
) -> Measures:
    """The measures, printed and written to results/<command>-*.json in the run, on rank 0.

    Args:
        run: The evaluation.
        evaluated: Students and images.
        measured: Numbers to write.
        title: Above the table's names.
        protocol: What the numbers depend on besides options, precision, images and students.
        bn_per_rank: Whether batch norm uses only this process's share of the batch.
    """
    if distributed.rank() != 0:
        return measured.results
    results, (diverged, batch_size) = measured
    content: dict[str, Any] = {
        "options": {
            key: value
            for key, value in decisive_options(to_plain(run.config)).items()
            if key != "run"
        },
        "precision": resolve(run.config.precision, run.device).value,
        "batch_size": batch_size,
    }
    if bn_per_rank:
        content["batch_size_per_rank"] = batch_size // distributed.world_size()
    content |= {
        **protocol,
        "diverged": sorted(diverged),
        "train": evaluated.train.fingerprint(),
        "val": evaluated.val.fingerprint(),
        "students": evaluated.frozen.record,
    }
    home = run_home(Path(run.config.run))
    named = {**content, "options": identity(dataclasses.replace(run.config, run="."), {})}
    path = write_results(home, run.command, content, results, named)
    columns = list(next(iter(results.values()), {}))
    rows = [
        [name, *(f"{value:.2f}" for value in values.values())] for name, values in results.items()
    ]
    rows += [[name, *("diverged" for _ in columns)] for name in diverged]
    print(markdown_table([f"{title}, %", *columns], rows))
    print(f"written to {path}")
    return WrittenMeasures(results, path)
