"""Actions on the cells of a sweep."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from seed_exp.base.files import write_json
from seed_exp.cluster import local, slurm_tools
from seed_exp.cluster.grid import expand, split_words
from seed_exp.cluster.show import outcome, outcome_table, status_json, status_table, write_csv
from seed_exp.cluster.submission import Request, Submission
from seed_exp.cluster.sweep_cells import ACTIVE, ENDED, State
from seed_exp.cluster.sweeps import (
    Sweep,
    load_sweep,
    load_sweeps,
    merge,
    save_sweep,
    selected,
    statuses_of,
    submission_lock,
    summary,
    sweep_name,
)
from seed_exp.config.compose import config_home
from seed_exp.config.sweep import launcher_profile

HOME = Path("runs") / "sweeps"


def submit(given: argparse.Namespace, wanted: frozenset[State] = frozenset({State.NEW})) -> None:
    """Submits the cells in the `wanted` states as one job array, or to a process on this machine.

    Raises:
        ValueError: cells of the grid would share a run folder, or SLURM refuses.
    """
    words, launcher_words = split_words(given.words)
    request = with_launcher(
        Request(given.launcher, launcher_words, given.parallel, given.gpus), given, words
    )
    profile = launcher_profile(given.command, words, request.launcher or "", request.options)
    grid = expand(given.command, words)
    if given.plan:
        print_plan(
            given.command,
            words,
            request.gpus or profile.get("nodes", 1) * profile.get("tasks_per_node", 1),
        )
    with nullcontext() if given.dry_run else submission_lock(HOME):
        sweep = merge(HOME, given.command, words, grid)
        statuses = statuses_of(HOME, [cell for _, cell in sweep.cells])
        chosen = [
            number for number in selected(given.cell, sweep) if statuses[number].state in wanted
        ]
        listed = [f"  {number} {sweep.cells[number][0]}" for number in chosen]
        submission = Submission(HOME, sweep, chosen, request, profile, config_home())
        print(f"{sweep.name}: {summary(statuses)}")
        if chosen and given.dry_run:
            print(
                "\n".join(
                    [f"would submit, as {submission.script}:", *listed, "", submission.text()]
                )
            )
        elif chosen:
            job = submission.start()
            following = f"next: python -m seed_exp.sweep status {sweep.command_words}"
            print("\n".join([f"submitted as job {job}, {submission.script}:", *listed, following]))
        else:
            others = ", ".join(sorted(state.value for state in ENDED))
            print(f"nothing to {given.action}: submit is for NEW cells, retry for {others}")
        if not given.dry_run:
            save_sweep(HOME, sweep)


def retry(given: argparse.Namespace) -> None:
    """Submits the cells that ended unfinished, to the place of their last submission.

    Errors as `submit`.
    """
    submit(given, ENDED)


def status(given: argparse.Namespace) -> None:
    """Prints a table, with --watch again and again until nothing is queued or running.

    Raises:
        ValueError: no such sweep, or SLURM does not answer (with --watch only printed).
    """
    named_sweeps(given)
    while True:
        try:
            active = show(given)
        except ValueError as error:
            if given.watch is None:
                raise
            print(f"error: {error}", file=sys.stderr)
            active = True
        if given.watch is None or not active:
            return
        time.sleep(given.watch)


def show(given: argparse.Namespace) -> bool:
    """Prints the table of each sweep once; returns whether any cell is queued or running."""
    found = [
        (sweep, statuses_of(HOME, [cell for _, cell in sweep.cells]))
        for sweep in named_sweeps(given)
    ]
    if given.json:
        print(json.dumps([status_json(*pair) for pair in found], indent=2))
    else:
        clear = "\x1b[H\x1b[2J" if given.watch is not None and sys.stdout.isatty() else ""
        print(clear + "\n\n".join(status_table(*pair) for pair in found), flush=True)
    return any(one.state in ACTIVE for _, statuses in found for one in statuses)


def cancel(given: argparse.Namespace) -> None:
    """Cancels the queued and running cells of a sweep, or those of them that are named.

    A running cell writes a checkpoint first.

    Raises:
        ValueError: no such sweep or cell, or SLURM does not answer.
    """
    (sweep,) = named_sweeps(given)
    with submission_lock(HOME):
        statuses = statuses_of(HOME, [cell for _, cell in sweep.cells])
        chosen = [
            number for number in selected(given.cell, sweep) if statuses[number].state in ACTIVE
        ]
        attempts = [sweep.cells[number][1].attempts[-1] for number in chosen]
        slurm_tools.scancel(
            [attempt.job for attempt in attempts if not attempt.job.startswith(local.PREFIX)]
        )
        for attempt in attempts:
            (HOME / attempt.folder / f"{attempt.job}.cancel").touch()
    print(
        "\n".join(f"cancelled {number} {sweep.cells[number][0]}" for number in chosen)
        or "nothing to cancel"
    )


def collect(given: argparse.Namespace) -> None:
    """Prints the cells' numbers, or writes them to --output.

    JSON holds everything, CSV a line for each number.

    Raises:
        ValueError: no such sweep, SLURM does not answer, or the file's name ends in something else.
    """
    if given.output is not None and given.output.suffix not in (".json", ".csv"):
        raise ValueError(f"--output {given.output} must end in .json or .csv")
    (sweep,) = named_sweeps(given)
    statuses = statuses_of(HOME, [cell for _, cell in sweep.cells])
    pairs = zip(sweep.cells, statuses, strict=True)
    outcomes = [
        outcome(number, label, cell, one) for number, ((label, cell), one) in enumerate(pairs)
    ]
    if given.output is None:
        print(outcome_table(outcomes))
    elif given.output.suffix == ".csv":
        write_csv(given.output, outcomes)
    else:
        write_json(given.output, {"sweep": sweep.name, "cells": outcomes})
    missing = [
        f"{one['cell']} {one['label']} is {one['state']}"
        for one in outcomes
        if one["state"] != State.FINISHED.value
    ]
    print(
        "\n".join(
            [f"{len(outcomes) - len(missing)} of {len(outcomes)} cells are finished", *missing]
        )
    )


def named_sweeps(given: argparse.Namespace) -> list[Sweep]:
    """The sweep that the words name; all sweeps for a status without words.

    Raises:
        ValueError: there is none.
    """
    words, _ = split_words(given.words)
    every = load_sweeps(HOME)
    if every and not words and given.action == "status":
        return every
    sweep = load_sweep(HOME, sweep_name(given.command, words))
    if sweep is None:
        known = "".join(f"\n  {one.command_words}" for one in every)
        line = " ".join(words) or "no options"
        raise ValueError(
            f"no sweep of {line} was submitted here; "
            + (f"there are:{known}" if known else f"{HOME} is empty")
        )
    return [sweep]


def with_launcher(request: Request, given: argparse.Namespace, words: list[str]) -> Request:
    """The request with a launcher.

    A retry takes that of the last submission; otherwise it is `slurm` where there is SLURM, `local`
    where not.
    """
    before = load_sweep(HOME, sweep_name(given.command, words))
    last = {} if before is None or not before.submissions else before.submissions[-1]
    if given.action == "retry" and "request" in last:
        return request.completed_from(Request(**last["request"]))
    if request.launcher is not None:
        return request
    if shutil.which("sbatch"):
        return replace(request, launcher="slurm")
    print("no SLURM here (no sbatch on PATH): --launcher local")
    return replace(request, launcher="local")


def print_plan(command: str, words: list[str], gpus: int) -> None:
    """Prints the cost of the sweep, each cell on so many devices, after a minute of measuring."""
    from seed_exp.benchmarks.planning import render  # imports torch
    from seed_exp.tools.plan import plan

    print(render(plan(command, words, seconds=60, num_images=None, gpus=gpus)), end="\n\n")
