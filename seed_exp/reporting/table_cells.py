"""A cell of a table: our number as a mean over seeds, the published one, and missing commands."""

from __future__ import annotations

import hashlib
import json
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_exp.base.redaction import redact
from seed_exp.config.schema import EVALUATIONS, Measure
from seed_exp.reporting.batch_statistics import teacher_reasons
from seed_exp.reporting.entries import WITHOUT_EFFECT, Entry, PlannedJob, options_of
from seed_exp.reporting.published import Published, learning_rates, published_of, reasons_against
from seed_exp.reporting.runs import Result, Run

MEASURES = {measure.column: measure for kind in EVALUATIONS.values() for measure in kind.measures}
"""Columns of the paper's Table 1 and, where a run has them, of other evaluations."""
EvaluationCommand = Callable[[Run, str, "Result | None"], str]
"""From a run, an evaluation and a result to be like, if any: the command line that evaluates."""


@dataclass(frozen=True)
class Provenance:
    """Source of one value of a mean."""

    run: Run
    """Run that trained the student."""
    result: Result
    """Evaluation that measured the value."""
    record: Mapping[str, Any]
    """Network, step and hash of the student's file that was evaluated."""
    value: float
    """The value, percent."""

    @property
    def seed(self) -> Any:
        """Seed of the training."""
        return self.run.options.get("seed")


@dataclass(frozen=True)
class Value:
    """Our number and the published one."""

    sources: tuple[Provenance, ...]
    """Our values, one per seed."""
    published: Published | None
    """The published number, if there is one."""
    reasons: tuple[str, ...]
    """Why the published number does not compare with ours; empty if it does."""

    @property
    def mean(self) -> float | None:
        """Mean over seeds, percent; None if there is no value yet."""
        return statistics.mean(source.value for source in self.sources) if self.sources else None

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds, percent; None for fewer than two."""
        return (
            statistics.stdev(source.value for source in self.sources)
            if len(self.sources) > 1
            else None
        )

    @property
    def difference(self) -> float | None:
        """Our mean minus the published number, in points; None if they do not compare."""
        return (
            None
            if self.mean is None or self.published is None or self.reasons
            else self.mean - self.published.value
        )

    @property
    def best_of(self) -> int:
        """Number of learning rates of which ours is the best; at least 1.

        The best is chosen by its accuracy on the images of the evaluation itself.
        """
        return max([1, *(len(learning_rates(source.result)) for source in self.sources)])


@dataclass(frozen=True)
class TableCell:
    """A student in a setting."""

    values: Mapping[str, Value]
    """Key of MEASURES -> value."""
    state: str = ""
    """Unfinished parts: `not run`, `step 300/600`, `no knn`; several are joined."""
    todo: tuple[str, ...] = ()
    """Commands that finish the unfinished parts."""
    runs: tuple[tuple[str, Run], ...] = ()
    """Name of the student and run, for each run in the cell."""


def protocol_id(result: Result) -> str:
    """Eight hexadecimal digits; equal for evaluations made in the same way on the same images."""
    return hashlib.sha256(json.dumps(shared_protocol(result), sort_keys=True).encode()).hexdigest()[
        :8
    ]


def shared_protocol(result: Result) -> dict[str, Any]:
    """The protocol without the parts that may differ between evaluations that compare.

    These are the students, the seed, the place of the images, and votes that are not shown.
    """
    protocol = {
        key: value
        for key, value in result.protocol.items()
        if key not in ("students", "diverged", "ks", "temperature")
    }
    if isinstance(options := protocol.get("options"), dict):
        protocol["options"] = {
            key: value for key, value in options.items() if key not in WITHOUT_EFFECT | {"networks"}
        }
    return protocol


def latest(run: Run, student: str, evaluation: str, protocol: str, key: str) -> Provenance | None:
    """The number of the student's latest checkpoint; None if there is none.

    Args:
        run: Run of the student.
        student: Name of the student in the run.
        evaluation: Name of the evaluation in reports.
        protocol: Protocol of the evaluation, as `protocol_id` gives it.
        key: Name of the number in the results.
    """
    sources = [
        Provenance(run, result, record, result.values[student][key])
        for result in run.results
        if result.evaluation == evaluation
        and protocol_id(result) == protocol
        and key in result.values.get(student, {})
        and isinstance(record := (result.protocol.get("students") or {}).get(student, {}), dict)
    ]
    return max(
        sources,
        key=lambda source: (source.record.get("step") or 0, str(source.result.path)),
        default=None,
    )


def main_protocols(entries: Iterable[Entry], notes: list[str]) -> dict[str, Result]:
    """Evaluation -> a result by the protocol that most students have; ties: first alphabetically.

    Adds a note for each evaluation that has several protocols.
    """
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    examples: dict[str, Result] = {}
    for entry in entries:
        if entry.run is not None:
            of_run = {
                protocol_id(result): result
                for result in entry.run.results
                if entry.name in result.values
            }
            examples |= of_run
            for protocol, result in of_run.items():
                counted[result.evaluation][protocol] += 1
    notes += [
        f"{name}: of {len(counts)} protocols the one of most runs is shown"
        for name, counts in sorted(counted.items())
        if len(counts) > 1
    ]
    return {
        name: examples[min((-num, protocol) for protocol, num in counts.items())[1]]
        for name, counts in counted.items()
    }


def cell_of(
    entries: Sequence[Entry],
    published: Sequence[Published],
    protocols: Mapping[str, Result],
    evaluation_command: EvaluationCommand,
    notes: list[str],
) -> TableCell:
    """The cell of a student in a setting, from its entries; adds a note for each repeated run."""
    by_seed: dict[Any, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_seed[entry.seed].append(entry)
    chosen = []
    for seed in sorted(by_seed, key=str):
        same = sorted(
            by_seed[seed],
            key=lambda entry: (-_progress(entry), str(entry.run.folder if entry.run else "")),
        )
        chosen.append(same[0])
        notes += [
            f"{entry.run.folder}: left out, {entry.name} repeats {same[0].run.folder}"
            for entry in same[1:]
            if entry.run and same[0].run
        ]
    values = {}
    for name, measure in MEASURES.items():
        made = [
            (entry, source)
            for entry in chosen
            if (source := _source(entry, measure, protocols)) is not None
        ]
        row = published_of(
            published, chosen[0].origin, measure.protocol, chosen[0].name, options_of(chosen[0])
        )
        values[name] = Value(
            tuple(source for _, source in made), row, tuple(_reasons(row, made, chosen[0]))
        )
    states: list[str] = []
    todo: list[str] = []
    for entry in chosen:
        state, commands = _missing(entry, protocols, evaluation_command)
        if state:
            states.append(f"seed {entry.seed}: {state}" if len(chosen) > 1 else state)
        todo += commands
    runs = tuple((entry.name, entry.run) for entry in chosen if entry.run is not None)
    return TableCell(values, "; ".join(states), tuple(dict.fromkeys(todo)), runs)


def _source(entry: Entry, measure: Measure, protocols: Mapping[str, Result]) -> Provenance | None:
    """The entry's number by the table's protocol; None if there is none."""
    if entry.run is None or measure.evaluation not in protocols:
        return None
    return latest(
        entry.run,
        entry.name,
        measure.evaluation,
        protocol_id(protocols[measure.evaluation]),
        measure.key,
    )


def _reasons(
    row: Published | None, made: Sequence[tuple[Entry, Provenance]], first: Entry
) -> list[str]:
    """Why our values do not compare with the published number; empty if they do.

    Before there are values, only the images that `first` plans to use count.
    """
    if row is None:
        return []
    if not made:
        planned = options_of(first).get("data.source")
        return [] if planned == row.dataset else [f"published for {row.dataset}, not for {planned}"]
    unfinished = [
        f"seed {source.seed} at step {source.record.get('step')} of {num}"
        for entry, source in made
        if (num := source.run.num_steps(entry.name)) is not None
        and (source.record.get("step") or num) < num
    ]
    own = (
        [f"the teacher is our own {row.teacher}"]
        if options_of(first).get("teacher.network") == "run"
        else []
    )
    reasons = [
        reason
        for entry, source in made
        for reason in reasons_against(row, source.run, entry.name, source.result)
    ]
    of_teachers = [reason for entry, _ in made for reason in teacher_reasons(entry.setting)]
    return list(dict.fromkeys([*unfinished, *reasons, *own, *of_teachers]))


def _missing(
    entry: Entry, protocols: Mapping[str, Result], evaluation_command: EvaluationCommand
) -> tuple[str, list[str]]:
    """The entry's unfinished parts in words, and the commands that finish them."""
    train = [] if entry.job is None else [shown_command(entry.job)]
    if entry.run is None:
        return "not run", train
    if not entry.run.is_done(entry.name):
        total = entry.run.num_steps(entry.name)
        return f"step {entry.run.step:,}/{'?' if total is None else f'{total:,}'}", train
    made = {
        measure.evaluation
        for measure in MEASURES.values()
        if _source(entry, measure, protocols) is not None
    }
    absent = sorted({measure.evaluation for measure in MEASURES.values() if measure.asked} - made)
    return " and ".join(f"no {name}" for name in absent), [
        redact(evaluation_command(entry.run, name, protocols.get(name))) for name in absent
    ]


def shown_command(job: PlannedJob) -> str:
    """Command line of the job, without secrets."""
    return redact(shlex.join(["python", "-m", f"seed_exp.{job.command}", *job.overrides]))


def _progress(entry: Entry) -> int:
    return 0 if entry.run is None else entry.run.step + len(entry.run.results)
