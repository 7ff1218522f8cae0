"""A sweep that outlives its terminal: every cell of a grid as a job of SLURM, or of this machine, from a copy of the code.

  python -m seed_exp.sweep submit table1 seed=0,1,2          a file of experiments/, and options as distill's -m takes them
  python -m seed_exp.sweep submit table1 seed=0,1,2 --dry-run --plan      prints the script and what it will cost
  python -m seed_exp.sweep status table1 seed=0,1,2 --watch               without options: every sweep
  python -m seed_exp.sweep retry table1 seed=0,1,2           starts again what failed, was cancelled or got lost, where it was
  python -m seed_exp.sweep cancel table1 seed=0,1,2 --cell 1
  python -m seed_exp.sweep collect table1 seed=0,1,2 --output table1.csv

What was submitted is in runs/sweeps. A cell that is finished, queued or running is never submitted again; sweeps that share a
cell share its job. What the cluster asks for: hydra.launcher.partition=gpu and so on, or the variables of conf/hydra/launcher.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from seed_exp.cluster import local, slurm_tools
from seed_exp.cluster.cells import ACTIVE, ENDED, Cell, State, labels
from seed_exp.cluster.show import outcome, outcome_table, status_json, status_table, write_csv
from seed_exp.cluster.submission import Request, Submission
from seed_exp.cluster.sweeps import (
    Sweep,
    load_sweep,
    load_sweeps,
    merge,
    nobody_else,
    save_sweep,
    selected,
    statuses_of,
    summary,
    sweep_name,
)
from seed_exp.config.arguments import Parser, count
from seed_exp.config.command import spelled_out
from seed_exp.config.compose import VERSION_BASE, compose, config_home, jobs
from seed_exp.config.errors import in_one_line
from seed_exp.files import write_json
from seed_exp.redaction import redact
from seed_exp.registry import lookup

HOME = Path("runs") / "sweeps"
LAUNCHER_WORDS = ("hydra.launcher.", "+hydra.launcher.", "++hydra.launcher.")


def submit(given: argparse.Namespace, wanted: frozenset[State] = frozenset({State.NEW})) -> None:
    """Submits the cells in the `wanted` states as one job array, or to a process on this machine.

    Raises:
        ValueError: cells of the grid would share a run folder, or SLURM refuses.
    """
    words, launcher_words = split_words(given.words)
    request = complete(Request(given.launcher, launcher_words, given.parallel, given.gpus), given, words)
    profile = launcher_profile(given.command, words, request)
    grid = expand(given.command, words)
    if given.plan:
        print_plan(given.command, words, request.gpus or profile.get("nodes", 1) * profile.get("tasks_per_node", 1))
    with nullcontext() if given.dry_run else nobody_else(HOME):
        sweep = merge(HOME, given.command, words, grid)
        statuses = statuses_of(HOME, [cell for _, cell in sweep.cells])
        chosen = [number for number in selected(given.cell, sweep) if statuses[number].state in wanted]
        listed = [f"  {number} {sweep.cells[number][0]}" for number in chosen]
        submission = Submission(HOME, sweep, chosen, request, profile, config_home())
        print(f"{sweep.name}: {summary(statuses)}")
        if chosen and given.dry_run:
            print("\n".join([f"would submit, as {submission.script}:", *listed, "", submission.text()]))
        elif chosen:
            job = submission.start()
            following = f"next: python -m seed_exp.sweep status {sweep.typed}"
            print("\n".join([f"submitted as job {job}, {submission.script}:", *listed, following]))
        else:
            others = ", ".join(sorted(state.value for state in ENDED))
            print(f"nothing to {given.action}: submit is for NEW cells, retry for {others}")
        if not given.dry_run:
            save_sweep(HOME, sweep)


def retry(given: argparse.Namespace) -> None:
    """Submits what ended without being finished, to where it was submitted last; errors as `submit`."""
    submit(given, ENDED)


def status(given: argparse.Namespace) -> None:
    """Prints a table, with --watch again and again until nothing is queued or running.

    Raises:
        ValueError: no such sweep, or SLURM does not answer; while it watches, the latter is only said.
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
    """Prints the table of each sweep once; whether any cell is queued or running."""
    found = [(sweep, statuses_of(HOME, [cell for _, cell in sweep.cells])) for sweep in named_sweeps(given)]
    if given.json:
        print(json.dumps([status_json(*pair) for pair in found], indent=2))
    else:
        clear = "\x1b[H\x1b[2J" if given.watch is not None and sys.stdout.isatty() else ""
        print(clear + "\n\n".join(status_table(*pair) for pair in found), flush=True)
    return any(one.state in ACTIVE for _, statuses in found for one in statuses)


def cancel(given: argparse.Namespace) -> None:
    """Cancels what is queued or running of a sweep, or of the cells named; a running cell writes a checkpoint first.

    Raises:
        ValueError: no such sweep or cell, or SLURM does not answer.
    """
    (sweep,) = named_sweeps(given)
    with nobody_else(HOME):
        statuses = statuses_of(HOME, [cell for _, cell in sweep.cells])
        chosen = [number for number in selected(given.cell, sweep) if statuses[number].state in ACTIVE]
        attempts = [sweep.cells[number][1].attempts[-1] for number in chosen]
        slurm_tools.scancel([attempt.job for attempt in attempts if not attempt.job.startswith(local.PREFIX)])
        for attempt in attempts:
            (HOME / attempt.folder / f"{attempt.job}.cancel").touch()
    print("\n".join(f"cancelled {number} {sweep.cells[number][0]}" for number in chosen) or "nothing to cancel")


def collect(given: argparse.Namespace) -> None:
    """Prints what the cells have come to, or writes it to --output: as JSON everything, as CSV a line for each number.

    Raises:
        ValueError: no such sweep, SLURM does not answer, or the file's name ends in something else.
    """
    if given.output is not None and given.output.suffix not in (".json", ".csv"):
        raise ValueError(f"--output {given.output} must end in .json or .csv")
    (sweep,) = named_sweeps(given)
    statuses = statuses_of(HOME, [cell for _, cell in sweep.cells])
    pairs = zip(sweep.cells, statuses, strict=True)
    outcomes = [outcome(number, label, cell, one) for number, ((label, cell), one) in enumerate(pairs)]
    if given.output is None:
        print(outcome_table(outcomes))
    elif given.output.suffix == ".csv":
        write_csv(given.output, outcomes)
    else:
        write_json(given.output, {"sweep": sweep.name, "cells": outcomes})
    missing = [f"{one['cell']} {one['label']} is {one['state']}" for one in outcomes if one["state"] != State.FINISHED.value]
    print("\n".join([f"{len(outcomes) - len(missing)} of {len(outcomes)} cells are finished", *missing]))


# --- what a line stands for ------------------------------------------------------------------------------------------


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the cells compute, and what the launcher is told.

    Raises:
        ValueError: a word that must not stand here.
    """
    launcher = [word for word in words if word.startswith(LAUNCHER_WORDS)]
    others = [word for word in words if word not in launcher]
    for word in words:
        key, _, value = word.partition("=")
        if key == "hydra/launcher":
            raise ValueError(f"{word}: choose where the cells run with --launcher {value}")
        if redact(word) != word:
            hint = f"put it into a variable and give {key}='${{oc.env:NAME}}'"
            raise ValueError(f"{redact(word)}: a secret would be written into a script; {hint}")
    return others, launcher


def expand(command: str, words: Sequence[str]) -> list[tuple[str, Cell]]:
    """Label and cell of every job of the grid, each composed and checked.

    Raises:
        ValueError: two cells would be in the same run folder.
    """
    from seed_exp.engine.run_folder import decisive_options, to_plain  # imports torch, which takes seconds

    grid = jobs(command, list(words))
    cells: dict[str, Cell] = {}
    for overrides in grid:
        config = compose(command, overrides)
        if config.run_dir is not None and len(grid) > 1:
            raise ValueError(f"run_dir={config.run_dir} would be the folder of {len(grid)} cells; leave it out")
        content = json.dumps([command, decisive_options(to_plain(config))], sort_keys=True)
        identity = hashlib.sha256(content.encode()).hexdigest()[:8]
        if identity in cells:
            same = " ".join(cells[identity].overrides)
            raise ValueError(f"the cells {same!r} and {' '.join(overrides)!r} compute the same; leave one out")
        cells[identity] = Cell(identity, command, overrides)
    return list(zip(labels(grid), cells.values(), strict=True))


def named_sweeps(given: argparse.Namespace) -> list[Sweep]:
    """The sweep of the line; for a status without options all of them.

    Raises:
        ValueError: there is none.
    """
    words, _ = split_words(given.words)
    every = load_sweeps(HOME)
    if every and not words and given.action == "status":
        return every
    sweep = load_sweep(HOME, sweep_name(given.command, words))
    if sweep is None:
        known = "".join(f"\n  {one.typed}" for one in every)
        line = " ".join(words) or "no options"
        raise ValueError(f"no sweep of {line} was submitted here; " + (f"there are:{known}" if known else f"{HOME} is empty"))
    return [sweep]


# --- where the cells run ---------------------------------------------------------------------------------------------


def complete(request: Request, given: argparse.Namespace, words: list[str]) -> Request:
    """With a launcher: for a retry that of the last submission, otherwise `slurm` where there is SLURM, and `local` where not."""
    before = load_sweep(HOME, sweep_name(given.command, words))
    last = {} if before is None or not before.submissions else before.submissions[-1]
    if given.action == "retry" and "request" in last:
        return request.following(Request(**last["request"]))
    if request.launcher is not None:
        return request
    if shutil.which("sbatch"):
        return replace(request, launcher="slurm")
    print("no SLURM here (no sbatch on PATH): --launcher local")
    return replace(request, launcher="local")


def launcher_profile(command: str, words: list[str], request: Request) -> dict[str, Any]:
    """The options of the launcher that is asked for.

    Raises:
        ValueError: no such profile, or an option that it does not have.
    """
    profiles = {file.stem: file for file in (config_home() / "conf" / "hydra" / "launcher").glob("*.yaml")}
    lookup(profiles, request.launcher or "", "launcher")
    with initialize_config_dir(str(config_home() / "conf"), version_base=VERSION_BASE):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        overrides = [*words, f"hydra/launcher={request.launcher}", *request.options]
        config = hydra.compose_config(command, overrides, RunMode.MULTIRUN, from_shell=False).hydra.launcher
        options: Any = OmegaConf.to_container(config, resolve=True)
    return dict(options)


def print_plan(command: str, words: list[str], gpus: int) -> None:
    """Prints what the sweep will cost, each cell on so many devices, after a minute of measuring."""
    from seed_exp.benchmarks.plan import render  # imports torch
    from seed_exp.plan import plan

    print(render(plan(command, words, seconds=60, num_images=None, gpus=gpus)), end="\n\n")


# --- the command line ------------------------------------------------------------------------------------------------


ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "submit": submit,
    "status": status,
    "collect": collect,
    "cancel": cancel,
    "retry": retry,
}


def main() -> None:
    """Reads the command line and acts; errors as those of the other commands."""
    if {"-h", "--help"} & set(sys.argv[1:]) or not sys.argv[1:]:
        print(__doc__)
    action = next(iter(sys.argv[1:]), "")
    if action.startswith("-") or not action:
        return
    with in_one_line():
        act = lookup(ACTIONS, action, "action of sweep")
        given = _parser(action).parse_intermixed_args(sys.argv[2:])
        given.action, given.words = action, spelled_out(given.words, given.command, "experiments")
        try:
            act(given)
        except KeyboardInterrupt:
            sys.exit(130)


def _parser(action: str) -> argparse.ArgumentParser:
    parser = Parser(f"python -m seed_exp.sweep {action}", allow_abbrev=False)
    parser.add_argument(
        "words", nargs="*", metavar="EXPERIMENT or KEY=VALUE", help="as `python -m seed_exp.distill -m` takes them"
    )
    parser.add_argument("--command", choices=["distill", "pretrain"], default="distill", help="what a cell runs (distill)")
    if action in ("submit", "retry"):
        parser.add_argument("--launcher", metavar="PROFILE", help="of conf/hydra/launcher: slurm, slurm_8gpu, slurm_2node, local")
        parser.add_argument("--parallel", type=count, metavar="N", help="cells that run at once (of the profile; local: 1)")
        parser.add_argument(
            "--gpus", type=count, metavar="G", help="local: GPUs, and processes, of each cell (one that sees all)"
        )
        parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
        parser.add_argument("--plan", action="store_true", help="first measure for a minute what it will cost")
    if action in ("submit", "retry", "cancel"):
        parser.add_argument(
            "--cell", action="append", default=[], metavar="CELL", help="only this one, by number or label; may be repeated"
        )
    if action == "status":
        parser.add_argument(
            "--watch", nargs="?", type=count, const=10, metavar="SECONDS", help="again and again until all is done (10)"
        )
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    if action == "collect":
        parser.add_argument(
            "--output", type=Path, metavar="FILE", help="write everything to FILE.json, or all numbers to FILE.csv"
        )
    return parser


if __name__ == "__main__":
    main()
