"""Contents of run folders, as far as they can be read.

Training goes on in some folders, others are damaged or belong to other programs.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from seed_exp.base.average_names import network_behind
from seed_exp.base.redaction import redact, redact_all
from seed_exp.config.schema import EVALUATIONS, TRAINING
from seed_exp.models.student_header import read_header

INSIDE = frozenset(
    {"checkpoints", "students", "results", "media", "export", "wandb", "tensorboard", "mlflow"}
) | {name for name, kind in EVALUATIONS.items() if kind.trains}
"""Folders of a run in which no other run is looked for."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Suffixes of the names of tensors that are no parameters."""
LONGEST_NAME = 200
"""Characters of a name that are shown, at most."""

Decisive = Callable[[str, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class StudentFile:
    """A student of a run, as its file describes it."""

    step: int | None
    """Optimiser steps of its training."""
    parameters: int
    """Parameters of the encoder."""


@dataclass(frozen=True)
class Result:
    """A file in results/."""

    path: Path
    evaluation: str
    """`knn`, `linear`, ...; fine-tuning with few labels is `semi_1pct` or `semi_10pct`."""
    protocol: dict[str, Any]
    values: dict[str, dict[str, float]]
    """Student -> measure -> number."""
    versions: dict[str, str]


@dataclass(frozen=True)
class Run:
    """A run folder of a command that trains encoders."""

    folder: Path
    command: str
    version: str
    options: dict[str, Any]
    """Options that change what is computed, flattened: {"data.root": ...}."""
    inputs: dict[str, str]
    """Fingerprints of the images and weights that it read, by name."""
    students: list[str]
    """Names, in the order of the options."""
    evaluations: list[str] = field(default_factory=list)
    """Evaluations that the run makes itself, each with its options: "linear lrs=[30]"."""
    networks: dict[str, StudentFile] = field(default_factory=dict)
    """Students that have been written, by name."""
    without_file: frozenset[str] = frozenset()
    """Students of a finished run whose files have been removed, or were left behind."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    speed: list[dict[str, float]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that left a trace in a file."""
        logged = [int(row["step"]) for row in self.metrics]
        return max([0, *logged, *(network.step or 0 for network in self.networks.values())])

    def num_steps(self, student: str) -> int | None:
        """Steps that the student, or the one whose average it is, is trained for.

        None before the first line of metrics, which tells the length of an epoch.
        """
        if isinstance(steps := self.options.get("steps"), int):
            return steps
        student = network_behind(student, self.students)
        epochs = self.options.get(f"students.{student}.epochs") or self.options.get("epochs")
        measured = [(row["step"], row["epoch"]) for row in self.metrics if row.get("epoch", 0) > 0]
        if not measured or not isinstance(epochs, int):
            return None
        return round(epochs * measured[-1][0] / measured[-1][1])

    def is_done(self, student: str) -> bool:
        """Whether the student's file has all steps, or had them."""
        if network_behind(student, self.students) in self.without_file:
            return True
        network, expected = self.networks.get(student), self.num_steps(student)
        return (
            network is not None
            and network.step is not None
            and expected is not None
            and network.step >= expected
        )


def read_runs(paths: Iterable[Path], decisive: Decisive) -> tuple[list[Run], list[str]]:
    """The runs at and below `paths`, sorted by folder, and a line for each unreadable thing.

    Args:
        paths: Folders; a run below several of them is listed once.
        decisive: Given a command and the options of a config.json, returns the decisive options,
            flattened.
    """
    problems: list[str] = []
    runs: dict[str, Run] = {}
    for path in paths:
        if not path.is_dir():
            problems.append(f"{path}: no such folder")
            continue
        for file in _config_files(path, problems):
            identity = os.path.realpath(file)
            if identity not in runs and (run := _read_run(file, decisive, problems)) is not None:
                runs[identity] = run
    return sorted(runs.values(), key=lambda run: str(run.folder)), [
        redact(problem) for problem in problems
    ]


def _config_files(root: Path, problems: list[str]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename}: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=unreadable):
        is_run = "config.json" in files
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not (is_run and name in INSIDE)
        )
        if is_run:
            yield Path(folder) / "config.json"


def _read_run(file: Path, decisive: Decisive, problems: list[str]) -> Run | None:
    content = _read_json(file, problems)
    if content is None:
        return None
    if not isinstance(content, dict) or not {"command", "options", "inputs"} <= content.keys():
        problems.append(f"{file}: not of a run of this package")
        return None
    if content["command"] not in TRAINING:
        return None  # trains no encoders, such as linear evaluation with a run_dir of its own
    options, inputs = content["options"], content["inputs"]
    students = options.get("students") if isinstance(options, dict) else None
    if not isinstance(students, dict) or not students or not isinstance(inputs, dict):
        problems.append(f"{file}: names no students")
        return None
    folder = file.parent
    return Run(
        folder=Path(redact(str(folder))),
        command=content["command"],
        version=_word(content.get("version", "unknown")),
        options=redact_all(decisive(content["command"], options)),
        inputs={_word(name): _word(value) for name, value in inputs.items()},
        students=[_word(name) for name in students],
        evaluations=[_word(line) for line in options.get("evaluations") or []],
        networks=dict(_networks(folder, problems)),
        without_file=frozenset(_without_file(folder, list(students), problems)),
        metrics=_read_lines(folder / "metrics.jsonl", problems),
        speed=_read_lines(folder / "speed.jsonl", problems),
        results=list(_results(folder / "results", problems)),
        pictures=sorted((folder / "media").rglob("*.png")),
    )


def _networks(folder: Path, problems: list[str]) -> Iterator[tuple[str, StudentFile]]:
    for path in sorted((folder / "students").glob("*.safetensors")):
        try:
            header = read_header(path)
            if header is None:
                raise ValueError("no student file")
            step = header.get("step")
            yield (
                _word(path.stem),
                StudentFile(step if isinstance(step, int) else None, _count_parameters(path)),
            )
        except (SafetensorError, OSError, ValueError) as error:
            problems.append(f"{path}: {_first_line(error)}")


def _without_file(folder: Path, students: list[str], problems: list[str]) -> Iterator[str]:
    if not (folder / "done.json").exists():
        return
    done = _read_json(folder / "done.json", problems)
    finished = done.get("students") if isinstance(done, dict) else None
    for name in finished if isinstance(finished, list) else []:
        if name in students and not (folder / "students" / f"{name}.safetensors").exists():
            yield name


def _count_parameters(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        names = [
            name
            for name in file.keys()  # noqa: SIM118
            if name.startswith("encoder.") and not name.endswith(STATISTICS)
        ]
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def _results(folder: Path, problems: list[str]) -> Iterator[Result]:
    for path in sorted(folder.glob("*.json")):
        content = _read_json(path, problems)
        if content is None:
            continue
        try:
            values = {
                _word(name): {
                    _word(key): float(value) for key, value in measures.items() if _is_number(value)
                }
                for name, measures in content["results"].items()
            }
            versions = {_word(name): _word(value) for name, value in content["versions"].items()}
            protocol = redact_all(dict(content["protocol"]))
            yield Result(
                Path(redact(str(path))),
                _name_in_reports(_word(content["evaluation"]), protocol),
                protocol,
                values,
                versions,
            )
        except (AttributeError, LookupError, TypeError, ValueError):
            problems.append(f"{path}: not a file of results")


def _name_in_reports(evaluation: str, protocol: dict[str, Any]) -> str:
    """The evaluation's name, or that of the benchmark with few labels that it is."""
    kind = EVALUATIONS.get(evaluation)
    for measure in () if kind is None else kind.measures:
        if (labels := measure.labels) is not None:
            options = protocol["options"]
            subset = Path(options.get("data.subset") or "").stem
            if labels.subset == subset or labels.fraction == options.get("data.fraction"):
                return measure.evaluation
    return evaluation


def _read_json(path: Path, problems: list[str]) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: {_first_line(error)}")
    return None


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, float]]:
    """Rows of numbers, each with its step; half a line at the end of a file is no problem."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []  # not yet
    except OSError as error:
        problems.append(f"{path}: {_first_line(error)}")
        return []
    rows, bad = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            numbers = {_word(key): float(value) for key, value in row.items() if _is_number(value)}
            _ = int(numbers["step"])
            rows.append(numbers)
        except (AttributeError, LookupError, ValueError, RecursionError):
            if number < len(lines) or line.endswith("\n"):
                bad += 1
    if bad:
        problems.append(f"{path}: {bad} of {len(lines)} lines cannot be read")
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _word(value: Any) -> str:
    """A name to show: shortened, without secrets, control characters and surrogates."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", redact(str(value)))
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"


def _first_line(error: Exception) -> str:
    return (
        (error.strerror if isinstance(error, OSError) else None)
        or str(error).partition("\n")[0]
        or type(error).__name__
    )
