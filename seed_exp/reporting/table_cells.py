"""A cell of a table: ours as a mean over seeds, published, what is missing."""

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
from seed_exp.reporting.entries import WITHOUT_EFFECT, Entry, PlannedJob, options_of
from seed_exp.reporting.published import Published, learning_rates, published_of, reasons_against
from seed_exp.reporting.runs import Result, Run

MEASURES = {measure.column: measure for kind in EVALUATIONS.values() for measure in kind.measures}
"""Columns of the paper's Table 1 and, where a run has them, of its semi-supervised table."""
EvaluationCommand = Callable[[Run, str, "Result | None"], str]


@dataclass(frozen=True)
class Provenance:
    """Where one value of a mean comes from."""

    run: Run
    result: Result
    record: Mapping[str, Any]
    """Of the student's file that was evaluated: network, step, hash."""
    value: float

    @property
    def seed(self) -> Any:
        """Of the training."""
        return self.run.options.get("seed")


@dataclass(frozen=True)
class Value:
    """Ours and theirs."""

    sources: tuple[Provenance, ...]
    """One per seed."""
    published: Published | None
    reasons: tuple[str, ...]
    """Why the published number does not compare with ours."""

    @property
    def mean(self) -> float | None:
        """Over seeds, percent; None if there is nothing yet."""
        return statistics.mean(source.value for source in self.sources) if self.sources else None

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds, where there are several."""
        return (
            statistics.stdev(source.value for source in self.sources)
            if len(self.sources) > 1
            else None
        )

    @property
    def difference(self) -> float | None:
        """Ours less theirs in points, where they compare."""
        return (
            None
            if self.mean is None or self.published is None or self.reasons
            else self.mean - self.published.value
        )

    @property
    def best_of(self) -> int:
        """How many learning rates ours is the best of, by accuracy on the images that it is measured on; at least 1."""
        return max([1, *(len(learning_rates(source.result)) for source in self.sources)])


@dataclass(frozen=True)
class TableCell:
    """A student in a setting."""

    values: Mapping[str, Value]
    """By key of MEASURES."""
    state: str = ""
    """What is not finished: `not run`, `step 300/600`, `not evaluated`; several are joined."""
    todo: tuple[str, ...] = ()
    """Commands that fill what is missing."""
    runs: tuple[tuple[str, Run], ...] = ()
    """The runs behind it and the student's name in each."""


def protocol_id(result: Result) -> str:
    """Eight hexadecimal digits that are the same for all evaluations made in the same way on the same images."""
    return hashlib.sha256(json.dumps(shared_protocol(result), sort_keys=True).encode()).hexdigest()[
        :8
    ]


def shared_protocol(result: Result) -> dict[str, Any]:
    """The protocol without what differs between evaluations that compare: students, seed, place of the images, other votes."""
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
    """The number `key` that the evaluation gave of the student's latest checkpoint, by the protocol of that id."""
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
    """By evaluation an example of the protocol that most students have; of equally many the first in the alphabet."""
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
    """The evaluation by the table's protocol."""
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
    return list(dict.fromkeys([*unfinished, *reasons, *own]))


def _missing(
    entry: Entry, protocols: Mapping[str, Result], evaluation_command: EvaluationCommand
) -> tuple[str, list[str]]:
    """What is not finished of the entry, in words, and the commands that finish it."""
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
    """The command line of the job."""
    return redact(shlex.join(["python", "-m", f"seed_exp.{job.command}", *job.overrides]))


def _progress(entry: Entry) -> int:
    return 0 if entry.run is None else entry.run.step + len(entry.run.results)
