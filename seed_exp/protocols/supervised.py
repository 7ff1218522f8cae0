"""What `linear`, `finetune` and `detect` share: networks on a run's students, trained with labels and measured on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seed_exp.base.table import markdown_table
from seed_exp.config.identity import identity
from seed_exp.config.options import decisive_options, to_plain
from seed_exp.config.schema import DetectConfig, FinetuneConfig, LinearConfig
from seed_exp.data.bad_samples import BadSamples
from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.engine.fit import fit
from seed_exp.engine.method import Method
from seed_exp.engine.precision import resolve
from seed_exp.engine.run_folder import log_to, open_run, run_lock
from seed_exp.engine.tracking import RunFacts, build_tracker
from seed_exp.evaluation.results import run_home, write_results
from seed_exp.evaluation.setup import FrozenRun, num_workers_of
from seed_exp.views.recipe import Views

Measures = dict[str, dict[str, float]]
"""By network its numbers, in percent."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that trains; it has a run folder of its own, in that of the run.

    Args:
        command: Its name.
        config: Its options.
        frozen: The students.
        train: What the networks are trained on.
        val: What they are measured on.
        device: Where.
    """

    command: str
    config: LinearConfig | FinetuneConfig | DetectConfig
    frozen: FrozenRun
    train: Source
    val: Source
    device: torch.device

    def open(self) -> Path:
        """The folder, opened and logged to; errors as `open_run`."""
        inputs = {"train": self.train.fingerprint(), "val": self.val.fingerprint()}
        inputs |= {name: record["sha256"] for name, record in self.frozen.record.items()}
        home = run_home(Path(self.config.run))
        with distributed.rank0_first():
            folder = open_run(
                self.command,
                "+".join(self.frozen.students),
                self.config,
                inputs,
                home / self.command,
            )
        log_to(folder)
        return folder

    def run(
        self,
        folder: Path,
        method: Method,
        views: Views,
        measure: Callable[[Collection[str]], Measures],
        bad_samples: Callable[[Source], BadSamples] | None,
        *,
        title: str,
        protocol: Mapping[str, Any],
        bn_per_rank: bool,
        lrs: Mapping[str, float] | None = None,
        summary: Callable[[Measures], Measures] = dict,
    ) -> Measures:
        """Trains `method`, measures it, prints a table, writes results/<command>-*.json into the run folder.

        Args:
            folder: What `open` gave.
            method: What to train.
            views: The training images' views.
            measure: Of networks by name; on other ranks than 0 it may give nothing.
            bad_samples: As `bad_samples_of` gives it.
            title: Above the table's names.
            protocol: What the numbers depend on besides options, precision, images and students.
            bn_per_rank: Whether the networks normalise by statistics of a batch, of which each process has its own part.
            lrs: As in `fit`.
            summary: Of what has been measured that which is shown.

        Returns:
            The summary; networks that diverged are left out.
        """
        config = self.config
        last: Measures | None = None

        def measured(names: Collection[str]) -> Measures:
            with torch.compiler.set_stance(
                "force_eager"
            ):  # every size of a batch would be compiled, also the last one's
                return measure(names)

        def evaluate(names: Collection[str]) -> dict[str, float]:
            nonlocal last
            last = measured(names)
            return {
                f"{name}/{key}": value
                for name, values in last.items()
                for key, value in values.items()
            }

        tracked = RunFacts(
            self.command,
            "+".join(self.frozen.students),
            list(self.frozen.students),
            to_plain(config),
        )
        with run_lock(folder), build_tracker(folder, config.tracker, tracked) as tracker:
            diverged, batch_size = fit(
                method,
                self.train,
                views,
                config,
                folder=folder,
                tracker=tracker,
                device=self.device,
                num_workers=num_workers_of(config.data),
                evaluate=evaluate,
                on_checkpoint=lambda *_: None,
                on_bad=None if bad_samples is None else bad_samples(self.train),
                lrs=lrs,
            )
            if last is None:  # it was finished, and is called again
                last = measured([name for name in method.trainable if name not in diverged])
            results = summary(last)
            columns = list(next(iter(results.values()), {}))
            tracker.log_table(
                self.command,
                ["network", *columns],
                [[name, *row.values()] for name, row in results.items()],
            )
        if distributed.rank() != 0:
            return results
        content = {
            "options": {
                key: value
                for key, value in decisive_options(to_plain(config)).items()
                if key != "run"
            },
            "precision": resolve(config.precision, self.device).value,
            "batch_size": batch_size,
            **(
                {"batch_size_per_rank": batch_size // distributed.world_size()}
                if bn_per_rank
                else {}
            ),
            **protocol,
            "diverged": sorted(diverged),
            "train": self.train.fingerprint(),
            "val": self.val.fingerprint(),
            "students": self.frozen.record,
        }
        chosen = identity(dataclasses.replace(config, run="."), {})
        path = write_results(
            run_home(Path(config.run)),
            self.command,
            content,
            results,
            {**content, "options": chosen},
        )
        rows = [
            [name, *(f"{value:.2f}" for value in values.values())]
            for name, values in results.items()
        ]
        rows += [[name, *("diverged" for _ in columns)] for name in diverged]
        print(markdown_table([f"{title}, %", *columns], rows))
        print(f"written to {path}")
        return results
