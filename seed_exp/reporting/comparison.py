"""Tables of students in rows and of what an experiment varies in columns: ours, published, what is missing."""

from __future__ import annotations

import hashlib
import json
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from seed_exp.models.teachers import TEACHERS
from seed_exp.redaction import redact
from seed_exp.reporting.published import (
    Origin,
    Published,
    network_of,
    objective_of,
    published_of,
    reasons_against,
    short_fingerprint,
    students_of,
)
from seed_exp.reporting.runs import Result, Run


class Measure(NamedTuple):
    """A number that evaluations give."""

    evaluation: str
    key: str
    """In a file of results."""
    protocol: str
    """In published.csv."""
    meaning: str
    asked: bool = True
    """Whether a run lacks something without it."""


MEASURES = {
    "K": Measure("knn", "knn10_majority", "knn", "k-NN top-1, k = 10, majority vote"),
    "T-1": Measure("linear", "top1", "linear_top1", "linear evaluation, top-1"),
    "T-5": Measure("linear", "top5", "linear_top5", "linear evaluation, top-5"),
    "1 %": Measure("semi_1pct", "top1", "semi_1pct", "fine-tuned with 1 % of the labels, top-1", asked=False),
    "10 %": Measure("semi_10pct", "top1", "semi_10pct", "fine-tuned with 10 % of the labels, top-1", asked=False),
}
"""Columns of the paper's Table 1 and, where a run has them, of its semi-supervised table; all in percent."""

WITHOUT_EFFECT = frozenset({"seed", "data.root", "data.val_root", "eval_every", "knn_bank_size", "knn_query_size"})
"""Options that may differ between runs of the same cell: repetitions, places of the images, evaluations on the way."""
NAMES = ("teacher", "objective.name", "views.name", "data.source")
"""Options that stand for others that change with them, best first."""
NO_TEACHER = "no teacher (MoCo-V2)"
WIDEST = 12
"""Differences to the plan of which more are counted, not listed."""

Setting = dict[str, Any]
EvaluationCommand = Callable[[Run, str, "Result | None"], str]


@dataclass(frozen=True)
class Job:
    """A planned run."""

    command: str
    overrides: Sequence[str]
    options: Mapping[str, Any]
    """Flat."""


@dataclass(frozen=True)
class Source:
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

    sources: tuple[Source, ...]
    """One per seed."""
    published: Published | None
    reasons: tuple[str, ...]
    """Why the published number does not compare with ours."""

    @property
    def mean(self) -> float | None:
        """Over seeds, percent; None if there is nothing yet."""
        return statistics.mean(source.value for source in self.sources) if self.sources else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, where there are several."""
        return statistics.stdev(source.value for source in self.sources) if len(self.sources) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours less theirs in points, where they compare."""
        return None if self.mean is None or self.published is None or self.reasons else self.mean - self.published.value


@dataclass(frozen=True)
class Cell:
    """A student in a setting."""

    values: Mapping[str, Value]
    """By key of MEASURES."""
    state: str = ""
    """What is not finished: `not run`, `step 300/600`, `not evaluated`; several are joined."""
    todo: tuple[str, ...] = ()
    """Commands that fill what is missing."""
    runs: tuple[tuple[str, Run], ...] = ()
    """The runs behind it and the student's name in each."""


@dataclass(frozen=True)
class Column:
    """A setting: what all its cells have in common and others have not."""

    label: str
    options: Mapping[str, Any]
    """All that varies in the table, with its value here."""


@dataclass(frozen=True)
class Table:
    """A comparison."""

    title: str
    rows: list[str]
    """Networks of the students."""
    parameters: dict[str, int | None]
    """Of their encoders."""
    columns: list[Column]
    cells: dict[tuple[str, int], Cell]
    """By row and number of the column; absent where nothing was planned."""
    measures: list[str]
    """Keys of MEASURES: those with a number, or all where there is none yet."""
    notes: list[str] = field(default_factory=list)
    """One line each: runs that are left out, images that differ."""


class _Entry(NamedTuple):
    """A student of a run, or of a job that no run belongs to yet."""

    row: str
    setting: Setting
    seed: Any
    name: str
    job: Job | None
    run: Run | None
    origin: Origin


def compare(
    title: str,
    runs: Sequence[Run],
    published: Sequence[Published],
    evaluation_command: EvaluationCommand,
    jobs: Sequence[Job] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Table:
    """The table of all `runs`, or of those that `jobs` plan.

    A run fills a planned cell if all its options that change results are the plan's; a student trained alone fills the cell that
    a fleet was planned for, as it becomes the same. Every measure is of one protocol, the one that most runs have.

    Args:
        title: Of the table.
        runs: All that were found.
        published: Numbers to stand beside ours.
        evaluation_command: For a run, the name of an evaluation and a result to be like, if any: the command line that makes it.
        jobs: What is planned; None = the runs are all there is.
        sizes: Parameters of networks, for those that no run has written yet.
    """
    folders = {run.folder.resolve(): run for run in runs}
    found = [_entry(run.command, run.options, name, None, run, folders) for run in runs for name in run.students]
    notes: list[str] = []
    if jobs is None:
        entries = [entry._replace(setting={**entry.setting, "images": _images(entry)}) for entry in found]
    else:
        planned = [
            _entry(job.command, job.options, name, job, None, folders) for job in jobs for name in students_of(job.options)
        ]
        entries = _matched(planned, found, notes)
    labelled = _columns([entry.setting for entry in entries])
    columns = list(dict.fromkeys(labelled[_key(entry.setting)].label for entry in entries))
    columns.sort(key=lambda label: NO_TEACHER not in label)  # the baseline first, otherwise in the given order
    chosen = {column.label: column for column in labelled.values()}
    protocols = _main_protocols(entries, notes)
    rows = list(dict.fromkeys(entry.row for entry in entries))
    cells = {}
    for row in rows:
        for number, label in enumerate(columns):
            mine = [entry for entry in entries if entry.row == row and labelled[_key(entry.setting)].label == label]
            if mine:
                cells[row, number] = _cell(mine, published, protocols, evaluation_command, notes)
    measures = [
        name
        for name, measure in MEASURES.items()
        if any(cell.values[name].sources or (measure.asked and cell.values[name].published) for cell in cells.values())
    ]
    parameters: dict[str, int | None] = {
        row: next(
            (size for entry in entries if entry.row == row and (size := _parameters(entry)) is not None), (sizes or {}).get(row)
        )
        for row in rows
    }
    return Table(
        title,
        rows,
        parameters,
        [chosen[label] for label in columns],
        cells,
        measures or [name for name, measure in MEASURES.items() if measure.asked],
        [redact(note) for note in notes],
    )


def protocol_id(result: Result) -> str:
    """Eight hexadecimal digits that are the same for all evaluations made in the same way on the same images."""
    return hashlib.sha256(json.dumps(shared_protocol(result), sort_keys=True).encode()).hexdigest()[:8]


def shared_protocol(result: Result) -> dict[str, Any]:
    """The protocol without what differs between evaluations that compare: students, seed, place of the images, other votes."""
    protocol = {key: value for key, value in result.protocol.items() if key not in ("students", "diverged", "ks", "temperature")}
    if isinstance(options := protocol.get("options"), dict):
        protocol["options"] = {key: value for key, value in options.items() if key not in WITHOUT_EFFECT | {"networks"}}
    return protocol


def latest(run: Run, student: str, evaluation: str, protocol: str, key: str) -> Source | None:
    """The number `key` that the evaluation gave of the student's latest checkpoint, by the protocol of that id."""
    sources = [
        Source(run, result, record, result.values[student][key])
        for result in run.results
        if result.evaluation == evaluation
        and protocol_id(result) == protocol
        and key in result.values.get(student, {})
        and isinstance(record := (result.protocol.get("students") or {}).get(student, {}), dict)
    ]
    return max(sources, key=lambda source: (source.record.get("step") or 0, str(source.result.path)), default=None)


def _entry(
    command: str, options: Mapping[str, Any], name: str, job: Job | None, run: Run | None, folders: Mapping[Path, Run]
) -> _Entry:
    setting: Setting = {
        key: value
        for key, value in options.items()
        if key not in WITHOUT_EFFECT and not key.startswith(("students.", "teacher."))
    }
    own = f"students.{name}."
    for key, value in options.items():
        if key.startswith(own) and key.removeprefix(own) not in ("network", "name"):
            setting[f"student.{key.removeprefix(own)}"] = value
    objective, teacher, teacher_ssl = objective_of(command, options), "", ""
    setting |= {"command": command, "objective.name": objective, "teacher": NO_TEACHER}
    if command == "distill":
        teacher, about = _teacher(options, folders)
        teacher_ssl = str(options.get("teacher_ssl.name"))
        setting |= about
    setting = {key: value for key, value in setting.items() if value is not None and value is not False}  # off, as if absent
    origin = Origin(network_of(options, name), teacher, teacher_ssl, objective)
    return _Entry(origin.student, setting, options.get("seed"), name, job, run, origin)


def _teacher(options: Mapping[str, Any], folders: Mapping[Path, Run]) -> tuple[str, Setting]:
    """The teacher's network, and all that is known of it: of one of our own, how its run was made."""
    kept = {
        key: value
        for key, value in options.items()
        if key.startswith("teacher.") and key not in ("teacher.network", "teacher.name", "teacher.checkpoint", "teacher.student")
    }
    name = str(options.get("teacher.name") or options.get("teacher.network"))
    if name != "run":
        spec = TEACHERS.get(name)
        return (spec.network if spec else None) or name, {**kept, "teacher": name}
    folder, _, file = str(options.get("teacher.checkpoint")).partition("/students/")
    run = folders.get(Path(folder).resolve())
    if run is None:
        return "", {**kept, "teacher": folder}
    student = options.get("teacher.student") or file.removesuffix(".safetensors") or run.students[0]
    made = _entry(run.command, run.options, student, None, run, folders)
    return made.row, {
        **kept,
        "teacher": f"{made.row} (ours)",
        **{f"teacher's {key}": value for key, value in made.setting.items()},
    }


def _matched(planned: Sequence[_Entry], found: Sequence[_Entry], notes: list[str]) -> list[_Entry]:
    """The planned entries, those with runs replaced by them; more seeds of the same cells too."""
    cells = {(entry.row, _key(entry.setting)): entry for entry in reversed(planned)}
    same = [entry for entry in found if (entry.row, _key(entry.setting)) in cells]
    counted = Counter(_images(entry) for entry in same).most_common()
    images = min((name for name, num in counted if num == counted[0][1]), default=None)
    kept = []
    for entry in same:
        assert entry.run is not None
        if _images(entry) == images:
            kept.append(entry._replace(job=cells[entry.row, _key(entry.setting)].job))
        else:
            notes.append(f"{entry.run.folder}: left out, trained on {_images(entry)}, most others on {images}")
    rows = {entry.row for entry in planned}
    teachers = {Path(str(_options(entry).get("teacher.checkpoint"))).resolve() for entry in (*planned, *found)}
    for entry in found:
        if entry.run is not None and entry.run.folder.resolve() in teachers:
            continue
        if entry.row in rows and (entry.row, _key(entry.setting)) not in cells:
            assert entry.run is not None
            nearest = min(
                (_difference(plan.setting, entry.setting) for plan in planned if plan.row == entry.row),
                key=lambda one: (len(one), one),
            )
            shown = ", ".join(nearest[:WIDEST]) + (f" and {len(nearest) - WIDEST} more" if len(nearest) > WIDEST else "")
            notes.append(f"{entry.run.folder}: {entry.name} is not of this experiment: {shown}")
    filled = {(entry.row, _key(entry.setting), entry.seed) for entry in kept}
    jobs = {(entry.row, _key(entry.setting), entry.seed): entry.job for entry in planned}
    kept = [entry._replace(job=jobs.get((entry.row, _key(entry.setting), entry.seed))) for entry in kept]
    missing = [entry for entry in planned if (entry.row, _key(entry.setting), entry.seed) not in filled]
    order = {place: number for number, place in enumerate(dict.fromkeys((entry.row, _key(entry.setting)) for entry in planned))}
    return sorted([*kept, *missing], key=lambda entry: order[entry.row, _key(entry.setting)])


def _difference(plan: Setting, setting: Setting) -> list[str]:
    return [
        f"{key} is {setting.get(key)}, planned {plan.get(key)}"
        for key in sorted(plan.keys() | setting.keys())
        if plan.get(key) != setting.get(key)
    ]


def _columns(settings: Sequence[Setting]) -> dict[str, Column]:
    """For the key of each setting its column. Of options that always change together, one stands for all."""
    distinct = {_key(setting): setting for setting in settings}
    keys = sorted({key for setting in distinct.values() for key in setting})
    together: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in keys:
        values = tuple(json.dumps(setting.get(key), sort_keys=True, default=str) for setting in distinct.values())
        if len(set(values)) > 1:
            first: dict[str, str] = {}
            together[tuple(first.setdefault(value, str(len(first))) for value in values)].append(key)
    representatives: list[str] = []
    apart: list[tuple[str, ...]] = [()] * len(distinct)  # the settings as the representatives tell them apart
    for partition, keys in sorted(together.items(), key=lambda item: _rank(min(item[1], key=_rank))):
        finer = [(*before, place) for before, place in zip(apart, partition, strict=True)]
        if len(set(finer)) > len(set(apart)):  # otherwise it follows from those before
            representatives.append(min(keys, key=_rank))
            apart = finer
    varying = [key for keys in together.values() for key in keys]
    columns = {}
    for name, setting in distinct.items():
        present = [key for key in representatives if setting.get(key) is not None]
        label = ", ".join(_labelled(key, setting.get(key)) for key in present or representatives) or "all runs"
        columns[name] = Column(label, {key: setting.get(key) for key in varying})
    return columns


def _rank(key: str) -> tuple[int, int, str]:
    known = NAMES.index(key) if key in NAMES else len(NAMES) + (not key.endswith(".name")) + 2 * key.startswith("teacher's ")
    return known, len(key), key


def _labelled(key: str, value: Any) -> str:
    if key == "teacher" and value == NO_TEACHER:
        return NO_TEACHER
    if key == "images":  # the hash tells images apart that are named alike
        value = f"{short_fingerprint(value)} #{str(value)[-16:][:4]}"
    return f"{key.removesuffix('.name')} {'–' if value is None else value}"


def _main_protocols(entries: Iterable[_Entry], notes: list[str]) -> dict[str, Result]:
    """By evaluation an example of the protocol that most students have; of equally many the first in the alphabet."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    examples: dict[str, Result] = {}
    for entry in entries:
        if entry.run is not None:
            of_run = {protocol_id(result): result for result in entry.run.results if entry.name in result.values}
            examples |= of_run
            for protocol, result in of_run.items():
                counted[result.evaluation][protocol] += 1
    notes += [
        f"{name}: of {len(counts)} protocols the one of most runs is shown"
        for name, counts in sorted(counted.items())
        if len(counts) > 1
    ]
    return {name: examples[min((-num, protocol) for protocol, num in counts.items())[1]] for name, counts in counted.items()}


def _cell(
    entries: Sequence[_Entry],
    published: Sequence[Published],
    protocols: Mapping[str, Result],
    evaluation_command: EvaluationCommand,
    notes: list[str],
) -> Cell:
    by_seed: dict[Any, list[_Entry]] = defaultdict(list)
    for entry in entries:
        by_seed[entry.seed].append(entry)
    chosen = []
    for seed in sorted(by_seed, key=str):
        same = sorted(by_seed[seed], key=lambda entry: (-_progress(entry), str(entry.run.folder if entry.run else "")))
        chosen.append(same[0])
        notes += [
            f"{entry.run.folder}: left out, {entry.name} repeats {same[0].run.folder}"
            for entry in same[1:]
            if entry.run and same[0].run
        ]
    values = {}
    for name, measure in MEASURES.items():
        sources = [source for entry in chosen if (source := _source(entry, measure, protocols)) is not None]
        row = published_of(published, chosen[0].origin, measure.protocol, _options(chosen[0]))
        values[name] = Value(tuple(sources), row, tuple(_reasons(row, sources, chosen[0])))
    states: list[str] = []
    todo: list[str] = []
    for entry in chosen:
        state, commands = _missing(entry, protocols, evaluation_command)
        if state:
            states.append(f"seed {entry.seed}: {state}" if len(chosen) > 1 else state)
        todo += commands
    runs = tuple((entry.name, entry.run) for entry in chosen if entry.run is not None)
    return Cell(values, "; ".join(states), tuple(dict.fromkeys(todo)), runs)


def _source(entry: _Entry, measure: Measure, protocols: Mapping[str, Result]) -> Source | None:
    """The evaluation by the table's protocol."""
    if entry.run is None or measure.evaluation not in protocols:
        return None
    return latest(entry.run, entry.name, measure.evaluation, protocol_id(protocols[measure.evaluation]), measure.key)


def _reasons(row: Published | None, sources: Sequence[Source], entry: _Entry) -> list[str]:
    if row is None:
        return []
    if not sources:
        planned = _options(entry).get("data.source")
        return [] if planned == row.dataset else [f"published for {row.dataset}, not for {planned}"]
    unfinished = [
        f"seed {source.seed} at step {source.record.get('step')} of {num}"
        for source in sources
        if (num := source.run.num_steps(entry.name)) is not None and (source.record.get("step") or num) < num
    ]
    own = [f"the teacher is our own {row.teacher}"] if _options(entry).get("teacher.network") == "run" else []
    reasons = [reason for source in sources for reason in reasons_against(row, source.run, source.result)]
    return list(dict.fromkeys([*unfinished, *reasons, *own]))


def _missing(entry: _Entry, protocols: Mapping[str, Result], evaluation_command: EvaluationCommand) -> tuple[str, list[str]]:
    """What is not finished of the entry, in words, and the commands that finish it."""
    train = [] if entry.job is None else [shown_command(entry.job)]
    if entry.run is None:
        return "not run", train
    if not entry.run.is_done(entry.name):
        total = entry.run.num_steps(entry.name)
        return f"step {entry.run.step:,}/{'?' if total is None else f'{total:,}'}", train
    made = {measure.evaluation for measure in MEASURES.values() if _source(entry, measure, protocols) is not None}
    absent = sorted({measure.evaluation for measure in MEASURES.values() if measure.asked} - made)
    return " and ".join(f"no {name}" for name in absent), [
        redact(evaluation_command(entry.run, name, protocols.get(name))) for name in absent
    ]


def shown_command(job: Job) -> str:
    """The command line of the job."""
    return redact(shlex.join(["python", "-m", f"seed_exp.{job.command}", *job.overrides]))


def _options(entry: _Entry) -> Mapping[str, Any]:
    maker: Run | Job | None = entry.run or entry.job
    assert maker is not None
    return maker.options


def _progress(entry: _Entry) -> int:
    return 0 if entry.run is None else entry.run.step + len(entry.run.results)


def _parameters(entry: _Entry) -> int | None:
    network = None if entry.run is None else entry.run.networks.get(entry.name)
    return None if network is None else network.parameters


def _images(entry: _Entry) -> str:
    return "unknown" if entry.run is None else entry.run.inputs.get("data", "unknown")


def _key(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True, default=str)
