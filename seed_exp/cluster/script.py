"""The script of a submission, for a job array of SLURM or for this machine: it runs one cell."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from seed_exp.base import announcement
from seed_exp.cluster.sweep_cells import Cell

_TEXT = """\
{header}
# The script's argument or, in SLURM, the array's task says which cell this is.
number=${{1:-$SLURM_ARRAY_TASK_ID}}
job={logs}/${{SWEEP_JOB:-$SLURM_ARRAY_JOB_ID}}_$number
case $number in
{cells}
  *) echo "error: there is no cell $number in this submission" >&2; exit 2 ;;
esac

# `sweep status` reads the exit status once SLURM has forgotten the job:
# the script outlives SIGTERM to write it.
rm -f "$job.exit"
cd {cwd} || {{ echo "1 0 $HOSTNAME" >"$job.exit"; exit 1; }}
{setup}
trap : TERM
export {announcement}="$job.run"
{run} {snapshot} "${{cell[@]}}"
status=$?
echo "$status ${{SLURM_RESTART_COUNT:-0}} ${{SLURMD_NODENAME:-$HOSTNAME}}" >"$job.exit"
exit "$status"
"""


@dataclass(frozen=True)
class Places:
    """Absolute paths in a script."""

    python: Path
    """The interpreter."""
    snapshot: Path
    """The code to run."""
    logs: Path
    """Where logs and exit statuses go."""
    cwd: Path
    """Working directory of the runs."""


def slurm_script(
    cells: Sequence[tuple[str, Cell]],
    places: Places,
    *,
    options: Mapping[str, str],
    parallel: int,
    setup: Sequence[str],
    srun: Sequence[str],
) -> str:
    """The batch script of a job array with a task for each cell.

    Args:
        cells: Label and cell, in the array's order.
        places: Where things are.
        options: Options of sbatch, besides those that the sweep sets.
        parallel: Tasks of the array that may run at once.
        setup: Lines of shell before the run.
        srun: Further arguments of srun.
    """
    array, output = f"0-{len(cells) - 1}%{parallel}", f"{places.logs}/%A_%a.log"
    own = {"array": array, "output": output, "open-mode": "append", "requeue": ""}
    named = {
        name: f"={shlex.quote(value)}" if value else ""
        for name, value in (own | dict(options)).items()
    }
    header = [f"#SBATCH --{name}{value}" for name, value in named.items()]
    # One rank that fails ends the others, which would wait for it.
    run = shlex.join(["srun", "--kill-on-bad-exit=1", *srun, str(places.python)])
    return _script(header, cells, places, setup=setup, run=run)


def local_script(cells: Sequence[tuple[str, Cell]], places: Places, *, tasks: int) -> str:
    """The script without SLURM: `SWEEP_JOB=NAME bash SCRIPT NUMBER` runs a cell.

    A cell runs in `tasks` processes.
    """
    several = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tasks}"]
        if tasks > 1
        else []
    )
    return _script([], cells, places, setup=[], run=shlex.join([str(places.python), *several]))


def _script(
    header: Sequence[str],
    cells: Sequence[tuple[str, Cell]],
    places: Places,
    *,
    setup: Sequence[str],
    run: str,
) -> str:
    branches = []
    for number, (label, cell) in enumerate(cells):
        words, comment = shlex.join([cell.command, *cell.overrides]), " ".join(label.split())
        branches.append(f"  {number}) cell=({words}) ;; # {comment}")
    return _TEXT.format(
        header="\n".join(["#!/bin/bash", *header, ""]),
        cells="\n".join(branches),
        setup="".join(f"{line}\n" for line in setup),
        run=run,
        announcement=announcement.VARIABLE,
        snapshot=shlex.quote(str(places.snapshot)),
        logs=shlex.quote(str(places.logs)),
        cwd=shlex.quote(str(places.cwd)),
    )
