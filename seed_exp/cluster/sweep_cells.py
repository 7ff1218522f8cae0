"""The cells of a sweep, their jobs, and how far they are.

All of it is in files, readable after SLURM has forgotten the jobs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from seed_exp.base.announcement import announced
from seed_exp.base.files import json_lines, write_json
from seed_exp.base.stopping import REQUEUE_STATUS

TAIL_BYTES = 1 << 16
"""Bytes that are read from the end of a growing file."""


class State(Enum):
    """State of a cell; SLURM's further words for PENDING and RUNNING stand beside it."""

    NEW = "NEW"
    """Never submitted."""
    PENDING = "PENDING"
    """Waits for its turn."""
    RUNNING = "RUNNING"
    """Has a machine."""
    FINISHED = "FINISHED"
    """Its run folder says so."""
    FAILED = "FAILED"
    """An error ended it."""
    STOPPED = "STOPPED"
    """A signal ended it after a checkpoint, and nobody has started it again."""
    CANCELLED = "CANCELLED"
    """`cancel` ended it."""
    UNKNOWN = "UNKNOWN"
    """Not queued, not finished, no exit status: its machine was lost, or its run folder is gone."""


ACTIVE = frozenset({State.PENDING, State.RUNNING})
ENDED = frozenset({State.FAILED, State.STOPPED, State.CANCELLED, State.UNKNOWN})
"""States whose cells `retry` starts again."""


class ScheduledJob(NamedTuple):
    """A scheduler's word on a job that is queued or running."""

    state: State
    word: str
    """The scheduler's own word, e.g. COMPLETING."""
    node: str = ""
    restarts: int = 0
    reason: str = ""
    """Why it waits."""


@dataclass(frozen=True)
class Attempt:
    """One job of a cell.

    It leaves files named after it: JOB.log, JOB.run (its run folder), JOB.exit (exit status,
    restarts, node), JOB.cancel.
    """

    job: str
    """Number in the array of a submission, e.g. 1234_0."""
    folder: str
    """Folder of these files, relative to the sweeps' home."""
    submitted: str
    """Time of submission; ISO 8601."""
    snapshot: str
    """Name of the snapshot it runs from."""


@dataclass
class Cell:
    """One job of a sweep's grid. Sweeps that contain the same options share it."""

    id: str
    """Hash of the command and of all options that change what is computed."""
    command: str
    overrides: list[str]
    """Options, as the command takes them."""
    attempts: list[Attempt] = field(default_factory=list)


class Status(NamedTuple):
    """State and progress of a cell."""

    state: State
    word: str
    """The state in the scheduler's own word where it has one."""
    node: str
    restarts: int
    said: str
    """A failed cell's error, a waiting cell's reason, otherwise the last line of the log."""
    run: Path | None
    """Run folder, once the job has said which it is."""
    progress: Mapping[str, float]
    """step, num_steps, loss (mean over students), images_per_s, seconds_left; as far as known."""


def cell_folder(home: Path, cell_id: str) -> Path:
    """Folder of the cell's cell.json."""
    return home / "cells" / cell_id


def load_cell(home: Path, cell_id: str) -> Cell | None:
    """The cell as it was saved; None if it never was."""
    file = cell_folder(home, cell_id) / "cell.json"
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    return Cell(**{**content, "attempts": [Attempt(**attempt) for attempt in content["attempts"]]})


def save_cell(home: Path, cell: Cell) -> None:
    """Writes cell.json."""
    write_json(cell_folder(home, cell.id) / "cell.json", asdict(cell))


def labels(grid: Sequence[Sequence[str]]) -> list[str]:
    """A label for each job of a grid: the overrides that not all jobs have."""
    common = set(grid[0]).intersection(*grid)
    return [
        " ".join(option for option in job if option not in common) or " ".join(job) for job in grid
    ]


def status_of(home: Path, cell: Cell, jobs: Mapping[str, ScheduledJob]) -> Status:
    """State and progress of a cell.

    Args:
        home: The sweeps' home, runs/sweeps; the runs' relative paths start two folders above.
        cell: The cell.
        jobs: All queued or running jobs, by the names that attempts have.
    """
    if not cell.attempts:
        return Status(State.NEW, "", "", 0, "", None, {})
    attempt = cell.attempts[-1]
    log, ending = (home / attempt.folder / f"{attempt.job}{suffix}" for suffix in (".log", ".exit"))
    run = _run_folder(home, cell)
    progress = {} if run is None else progress_of(run)
    if (job := jobs.get(attempt.job)) is not None:
        said = job.reason if job.state is State.PENDING else last_line(log)
        return Status(job.state, job.word, job.node, job.restarts, said, run, progress)
    left = ending.read_text().split() if ending.exists() else []
    status, restarts, node = (*left, "", "", "")[:3]
    finished = run is not None and (run / "done.json").exists()
    cancelled = (home / attempt.folder / f"{attempt.job}.cancel").exists()
    state = _ended(status, finished=finished, cancelled=cancelled)
    said = error_line(log) if state in (State.FAILED, State.UNKNOWN) else last_line(log)
    return Status(state, "", node, int(restarts or 0), said, run, progress)


def progress_of(run: Path) -> dict[str, float]:
    """Progress from the files of a run folder, with the keys of `Status.progress`."""
    metrics = [line for line in last_lines(run / "metrics.jsonl") if "epoch" in line]
    if not metrics or not (run / "config.json").exists():
        return {}
    options, now = json.loads((run / "config.json").read_text())["options"], metrics[-1]
    losses = [
        value
        for key, value in now.items()
        if key.endswith("/loss") and isinstance(value, int | float)
    ]
    num_steps = options["steps"] or round(options["epochs"] * now["step"] / now["epoch"])
    known = {"step": now["step"], "num_steps": num_steps}
    if losses:
        known["loss"] = sum(losses) / len(losses)
    if (speeds := last_lines(run / "speed.jsonl")) and (rate := speeds[-1].get("images_per_s")):
        known["images_per_s"] = rate
        if isinstance(options["batch_size"], int):
            known["seconds_left"] = (num_steps - now["step"]) * options["batch_size"] / rate
    return known


def last_line(log: Path) -> str:
    """The last non-empty line of a log, of the run rather than of SLURM; empty if there is none."""
    lines = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("srun: ", "slurmstepd"))]
    return (own or lines or [""])[-1]


def error_line(log: Path) -> str:
    """The line of a log that says why the run ended.

    The run's own last error, otherwise that of an exception, of SLURM, or simply the last line.
    """
    lines = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    for pattern in (
        r"error( \(rank \d+\))?: ",
        r"[\w.]*(Error|Exception)\b",
        r"slurmstepd.*error: ",
        r"srun: error: ",
    ):
        if found := [line for line in lines if re.match(pattern, line)]:
            return found[-1]
    return lines[-1] if lines else ""


def _ended(status: str, *, finished: bool, cancelled: bool) -> State:
    """The state of a cell whose job is over, from what it left."""
    if finished:
        return State.FINISHED
    if cancelled:
        return State.CANCELLED
    if status == str(REQUEUE_STATUS):
        return State.STOPPED
    return State.FAILED if status not in ("", "0") else State.UNKNOWN


def _run_folder(home: Path, cell: Cell) -> Path | None:
    """The run folder that the cell's newest job has announced, of those jobs that came so far."""
    for attempt in reversed(cell.attempts):
        if (run := announced(home / attempt.folder / f"{attempt.job}.run")) is not None:
            return home.parents[1] / run
    return None


def last_lines(file: Path) -> list[dict[str, Any]]:
    """Objects in the last lines of a file of JSON lines, without a line that is half written."""
    return json_lines(_tail(file))


def _tail(file: Path) -> str:
    if not file.exists():
        return ""
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - TAIL_BYTES))
        return opened.read().decode(errors="replace")
