"""The evaluations that follow a training in the same job, so that one command fills a table."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seed_exp.base.files import file_hash, write_json
from seed_exp.base.redaction import redact, unsigned
from seed_exp.base.registry import lookup
from seed_exp.config.compose import compose
from seed_exp.config.errors import is_for_user, words_of
from seed_exp.config.of_run import takes_views, view_words
from seed_exp.config.options import decisive_options, flatten, to_plain
from seed_exp.config.schema import EVALUATIONS, SCHEMAS, EncoderFitConfig
from seed_exp.config.words import word
from seed_exp.engine import distributed
from seed_exp.models.students import student_files
from seed_exp.protocols.detect import detect
from seed_exp.protocols.finetune import finetune
from seed_exp.protocols.knn import knn
from seed_exp.protocols.linear import linear
from seed_exp.protocols.retrieval import retrieval
from seed_exp.protocols.segment import segment

log = logging.getLogger("seed_exp")

PROTOCOLS: dict[str, Callable[[Any], Any]] = {
    "knn": knn,
    "retrieval": retrieval,
    "linear": linear,
    "finetune": finetune,
    "detect": detect,
    "segment": segment,
}
"""What runs each of config.schema.EVALUATIONS, given its options."""


class PlannedEvaluation(NamedTuple):
    """An evaluation, composed and checked; only its run folder is missing."""

    line: str
    """Name and options, as `evaluations` gives them."""
    run: Callable[[Any], Any]
    """Evaluates, given the options."""
    config: Any
    """The options; `run` is a placeholder."""


def plan_evaluations(config: EncoderFitConfig) -> list[PlannedEvaluation]:
    """The evaluations that `config.evaluations` names, before training starts.

    Raises:
        ValueError, HydraException: an evaluation does not exist or does not take these options.
    """
    evaluations = []
    for line in config.evaluations:
        name, *options = shlex.split(line) or [""]
        run = lookup(PROTOCOLS, name, "evaluation")
        composed = compose(name, ["run=.", *_inherited(name, config, options), *options])
        evaluations.append(PlannedEvaluation(line, run, composed))
    return evaluations


def run_evaluations(
    evaluations: Sequence[PlannedEvaluation], folder: Path, diverged: Collection[str] = ()
) -> None:
    """Evaluates students in the run folder; skips what is done for these very students.

    Args:
        evaluations: Evaluations, each of the networks that its options name, by default all.
        folder: Run folder.
        diverged: Names of networks that are not evaluated.

    Raises:
        ValueError: an evaluation failed; the others are done. In a group of processes each one
            raises the original error at once.
    """
    failed = []
    barrier = distributed.Barrier()
    record = folder / "evaluated.json"
    for line, run, config in evaluations:
        files = student_files(folder)
        students = {name: file_hash(path) for name, path in files.items() if name not in diverged}
        done = json.loads(record.read_text()) if record.exists() else {}
        name = name_of(line)
        if done.get(name) == students:
            log.info("%s: done before", line)
            continue
        names = config.networks
        if diverged:
            names = [name for name in names or students if name not in diverged]
        if names == []:
            log.warning("%s: all of its networks have diverged", line)
            continue
        problem = None
        try:
            run(dataclasses.replace(config, run=str(folder), networks=names))
        # Any: the students are trained, and other evaluations do not depend on it.
        except Exception as error:
            if distributed.world_size() > 1:  # other processes may be waiting for this one
                raise
            problem = words_of(error) if is_for_user(error) else traceback.format_exc()
        if problem is not None:
            failed.append(line)
            log.error("%s failed: %s", line, problem)
        elif distributed.rank() == 0:
            others = {name_of(other): evaluated for other, evaluated in done.items()}
            write_json(record, {**others, name: students})
        barrier.wait()  # rank 0 measures alone, and the next evaluation begins together
    if failed:
        raise ValueError(
            f"{folder}: the students are trained, but {' and '.join(map(repr, failed))} failed, "
            "as log.txt says; the same command, typed again, repeats nothing else"
        )


def name_of(line: str) -> str:
    """The evaluation's name in evaluated.json: without secrets, the same when signed anew."""
    return redact(unsigned(line))


def _inherited(name: str, config: EncoderFitConfig, given: Sequence[str]) -> list[str]:
    """Options that the evaluation takes from the training, as on its command line."""
    kind = EVALUATIONS[name]
    known = {field.name for field in dataclasses.fields(SCHEMAS[name])}
    foreign = {"data"} if kind.sources and config.data.source not in kind.sources else set()
    wanted = [option for option in kind.inherits if option in known - foreign]
    shared = {option: getattr(config, option) for option in wanted}
    groups = {"data": config.data.source, "tracker": config.tracker.name}
    chosen = [word(group, option) for group, option in groups.items() if group in shared]
    options = flatten({option: to_plain(value) for option, value in shared.items()})
    words = [*chosen, *(word(key, value) for key, value in options.items())]
    if takes_views(name) and not any(option.startswith("views=") for option in given):
        words += view_words(decisive_options(to_plain(config)))
    return words
