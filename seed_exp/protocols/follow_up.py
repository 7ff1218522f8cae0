"""The evaluations that follow a training in the same job, so that one command fills a table."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seed_exp.base.files import file_hash, write_json
from seed_exp.base.registry import lookup
from seed_exp.config.compose import compose
from seed_exp.config.options import flatten, to_plain
from seed_exp.config.schema import SCHEMAS, EncoderFitConfig
from seed_exp.config.sweep import override_value
from seed_exp.engine import distributed
from seed_exp.models.students import student_files
from seed_exp.protocols.finetune import finetune
from seed_exp.protocols.knn import knn
from seed_exp.protocols.linear import linear

log = logging.getLogger("seed_exp")

EVALUATIONS: dict[str, Callable[[Any], Any]] = {"knn": knn, "linear": linear, "finetune": finetune}
"""Commands that evaluate a run, by name."""
INHERITED = ("data", "tracker", "device", "precision", "seed")
"""Options that an evaluation takes from the training, where it has them."""


class PlannedEvaluation(NamedTuple):
    """One of them, ready to be run."""

    line: str
    """As `evaluations` names it."""
    run: Callable[[Any], Any]
    """The command."""
    config: Any
    """Its options; only the run folder is still open."""


def plan_evaluations(config: EncoderFitConfig) -> list[PlannedEvaluation]:
    """What `config.evaluations` stands for, before training starts.

    Raises:
        ValueError, HydraException: no such evaluation, or it does not take these options.
    """
    evaluations = []
    for line in config.evaluations:
        name, *options = shlex.split(line) or [""]
        run = lookup(EVALUATIONS, name, "evaluation")
        evaluations.append(
            PlannedEvaluation(
                line, run, compose(name, ["run=.", *_inherited(name, config), *options])
            )
        )
    return evaluations


def run_evaluations(evaluations: Sequence[PlannedEvaluation], folder: Path) -> None:
    """Evaluates the students in the run folder. What has been done for these very students is not repeated.

    Raises:
        ValueError: one of them failed; the others are done. Of several processes each raises the error itself, at once.
    """
    failed = []
    record = folder / "evaluated.json"
    for line, run, config in evaluations:
        students = {name: file_hash(path) for name, path in student_files(folder).items()}
        done = json.loads(record.read_text()) if record.exists() else {}
        if done.get(line) == students:
            log.info("%s: done before", line)
            continue
        problem = None
        try:
            run(dataclasses.replace(config, run=str(folder)))
        except Exception:  # whatever it is: the students are trained, and the other evaluations do not depend on this one
            if distributed.world_size() > 1:  # other processes may be waiting for this one
                raise
            problem = traceback.format_exc()
        if problem is not None:
            failed.append(line)
            log.error("%s failed:\n%s", line, problem)
        elif distributed.rank() == 0:
            write_json(record, {**done, line: students})
    if failed:
        raise ValueError(
            f"{folder}: the students are trained, but {' and '.join(map(repr, failed))} failed, as log.txt says; "
            "the same command, typed again, repeats nothing else"
        )


def _inherited(command: str, config: EncoderFitConfig) -> list[str]:
    """The options of the training that the command has too, as on its command line."""
    known = {field.name for field in dataclasses.fields(SCHEMAS[command])}
    shared = {name: getattr(config, name) for name in INHERITED if name in known}
    groups = {"data": config.data.source, "tracker": config.tracker.name}
    chosen = [f"{group}={option}" for group, option in groups.items() if group in shared]
    options = flatten({name: to_plain(value) for name, value in shared.items()})
    return [*chosen, *(f"{key}={override_value(value)}" for key, value in options.items())]
