"""A sweep: a command line and the cells that it stands for, kept in runs/sweeps.

cells/ID/cell.json     a cell and what was started for it
snapshots/ID/          the code that jobs run from
NAME/sweep.json        a sweep: its cells, its submissions
NAME/001.sh            the script of its first submission
NAME/logs/JOB.*        what each job leaves: its log, its run folder, its exit status
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_exp.base.files import open_lock, write_json
from seed_exp.base.registry import closest
from seed_exp.cluster import local, slurm_tools
from seed_exp.cluster.sweep_cells import (
    ACTIVE,
    Cell,
    State,
    Status,
    load_cell,
    save_cell,
    status_of,
)


@dataclass(frozen=True)
class Sweep:
    """A command line, and the cells that it stands for."""

    command: str
    words: list[str]
    """Options as given, without those that say where the cells run."""
    cells: list[tuple[str, Cell]]
    """Label and cell; a cell's number is its place."""
    submissions: list[dict[str, Any]]
    """Submissions so far: job, script, time, snapshot, state of git, cells, requested place."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return sweep_name(self.command, self.words)

    @property
    def command_words(self) -> str:
        """Words behind `sweep status` that name this sweep."""
        return shlex.join(
            self.words + ([] if self.command == "distill" else ["--command", self.command])
        )


def sweep_name(command: str, words: Sequence[str]) -> str:
    """The folder of the sweep that these words stand for, in whatever order."""
    experiment = next(
        (word.partition("=")[2] for word in words if word.startswith("experiments=")), command
    )
    digest = hashlib.sha256(json.dumps([command, *sorted(words)]).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', experiment)}-{digest[:6]}"


def load_sweep(home: Path, name: str) -> Sweep | None:
    """The saved sweep; None if it was never saved."""
    file = home / name / "sweep.json"
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    cells = [(cell["label"], load_cell(home, cell["id"])) for cell in content["cells"]]
    known = [(label, cell) for label, cell in cells if cell is not None]
    return Sweep(content["command"], content["words"], known, content["submissions"])


def load_sweeps(home: Path) -> list[Sweep]:
    """All saved sweeps, sorted by name."""
    found = [load_sweep(home, file.parent.name) for file in sorted(home.glob("*/sweep.json"))]
    return [sweep for sweep in found if sweep is not None]


def save_sweep(home: Path, sweep: Sweep) -> None:
    """Writes sweep.json and each cell's cell.json."""
    for _, cell in sweep.cells:
        save_cell(home, cell)
    cells = [{"label": label, "id": cell.id} for label, cell in sweep.cells]
    content = {
        "command": sweep.command,
        "words": sweep.words,
        "cells": cells,
        "submissions": sweep.submissions,
    }
    write_json(home / sweep.name / "sweep.json", content)


def merge(home: Path, command: str, words: list[str], grid: Sequence[tuple[str, Cell]]) -> Sweep:
    """The sweep with this grid, and with every job ever started for its cells, by any command line.

    A cell that the grid no longer has, because a file was edited, stays in the sweep while it is
    queued or running.

    Raises:
        ValueError: SLURM does not answer.
    """
    before = load_sweep(home, sweep_name(command, words))
    cells = []
    for label, cell in grid:
        known = load_cell(home, cell.id)
        cells.append(
            (
                label,
                cell if known is None else Cell(cell.id, command, cell.overrides, known.attempts),
            )
        )
    if before is None:
        return Sweep(command, words, cells, [])
    ids = {cell.id for _, cell in cells}
    gone = [(label, cell) for label, cell in before.cells if cell.id not in ids]
    statuses = statuses_of(home, [cell for _, cell in gone])
    kept = [pair for pair, status in zip(gone, statuses, strict=True) if status.state in ACTIVE]
    return Sweep(command, words, cells + kept, before.submissions)


def statuses_of(home: Path, cells: Sequence[Cell]) -> list[Status]:
    """The status of each cell; asks SLURM once, and only if some cells are not known as finished.

    Raises:
        ValueError: SLURM does not answer.
    """
    unfinished = [
        cell
        for cell in cells
        if cell.attempts and status_of(home, cell, {}).state is not State.FINISHED
    ]
    last = [cell.attempts[-1] for cell in unfinished]
    here = [attempt for attempt in last if attempt.job.startswith(local.PREFIX)]
    jobs = local.active(home, here)
    if len(here) < len(last):
        jobs |= slurm_tools.active()
    return [status_of(home, cell, jobs) for cell in cells]


def summary(statuses: Sequence[Status]) -> str:
    """Number of cells in each state, in words."""
    counts = Counter(status.state for status in statuses)
    return f"{len(statuses)} cells" + "".join(
        f", {counts[state]} {state.value}" for state in State if counts[state]
    )


def selected(names: Sequence[str], sweep: Sweep) -> list[int]:
    """Numbers of the cells that are named by number or label; all if none is named.

    Raises:
        ValueError: no such cell.
    """
    numbers = {str(number): number for number in range(len(sweep.cells))}
    known = {label: number for number, (label, _) in enumerate(sweep.cells)} | numbers
    for name in names:
        if name not in known:
            raise ValueError(f"the sweep has no cell {name!r}; {closest(name, known)}")
    return [known[name] for name in names] or list(range(len(sweep.cells)))


@contextmanager
def submission_lock(home: Path) -> Iterator[None]:
    """While entered, no other process submits or cancels; waits for one that does."""
    home.mkdir(parents=True, exist_ok=True)
    with open_lock(home / "lock") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
