"""SLURM's tools: sbatch's options from a launcher profile, submit, cancel, list the queue."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from seed_exp.base.registry import closest
from seed_exp.cluster.sweep_cells import ScheduledJob, State

SBATCH_OPTIONS = {
    "account": "account",
    "comment": "comment",
    "constraint": "constraint",
    "cpus_per_gpu": "cpus-per-gpu",
    "cpus_per_task": "cpus-per-task",
    "exclude": "exclude",
    "exclusive": "exclusive",
    "gpus_per_node": "gpus-per-node",
    "gpus_per_task": "gpus-per-task",
    "gres": "gres",
    "mem_gb": "mem",
    "mem_per_cpu": "mem-per-cpu",
    "mem_per_gpu": "mem-per-gpu",
    "nodelist": "nodelist",
    "nodes": "nodes",
    "partition": "partition",
    "qos": "qos",
    "signal_delay_s": "signal",
    "tasks_per_node": "ntasks-per-node",
    "timeout_min": "time",
}
"""Options of hydra-submitit-launcher and what sbatch calls them."""
UNITS = {"mem_gb": "{}G", "signal_delay_s": "USR2@{}"}
"""Formats of values that sbatch writes otherwise.

The signal goes to the tasks, not to the batch script, that many seconds before the time limit.
"""
NOT_SBATCH = frozenset(
    {
        "_target_",
        "submitit_folder",
        "name",
        "stderr_to_stdout",
        "max_num_timeout",
        "array_parallelism",
        "additional_parameters",
    }
    | {"setup", "srun_args"}
)
"""Options of the launcher that are used elsewhere or concern submitit alone."""

WAITING = frozenset(
    {
        "PENDING",
        "REQUEUED",
        "REQUEUE_HOLD",
        "REQUEUE_FED",
        "SPECIAL_EXIT",
        "RESV_DEL_HOLD",
        "CONFIGURING",
    }
)
"""SLURM's words for a job that has no machine to run on yet."""

TIMEOUT_S = 60


def sbatch_options(launcher: Mapping[str, Any]) -> dict[str, str]:
    """Options of sbatch, without their dashes, that a launcher profile asks for.

    An option that takes no value has an empty one.

    Raises:
        ValueError: an option that no launcher has; the message names the closest.
    """
    asked = {
        key: value for key, value in launcher.items() if key not in NOT_SBATCH and _is_given(value)
    }
    if unknown := sorted(asked.keys() - SBATCH_OPTIONS.keys()):
        known = SBATCH_OPTIONS.keys() | NOT_SBATCH
        raise ValueError(
            f"hydra.launcher.{unknown[0]} is no option of a SLURM job; "
            f"{closest(unknown[0], known)}; "
            "+hydra.launcher.additional_parameters.NAME=VALUE passes any option of sbatch"
        )
    options = {
        SBATCH_OPTIONS[key]: UNITS.get(key, "{}").format(value) for key, value in asked.items()
    }
    further = {
        str(key): str(value)
        for key, value in (launcher.get("additional_parameters") or {}).items()
        if _is_given(value)
    }
    return {
        name: "" if value == "True" else value
        for name, value in sorted((options | further).items())
    }


def sbatch(script: Path) -> str:
    """Submits the script; returns the number of the job.

    Raises:
        ValueError: there is no SLURM here, or it refuses the job.
    """
    return call("sbatch", "--parsable", os.fspath(script)).strip().partition(";")[0]


def scancel(jobs: Collection[str]) -> None:
    """Cancels the jobs; those that have ended are no error.

    Raises:
        ValueError: SLURM does not answer.
    """
    if jobs:
        call("scancel", "--quiet", *sorted(jobs))


def active() -> dict[str, ScheduledJob]:
    """The user's jobs that are queued or running, by number or, in an array, NUMBER_TASK.

    Raises:
        ValueError: SLURM does not answer.
    """
    fields = ("JobArrayID", "State", "NodeList", "RestartCnt", "Reason")
    lines = call(
        "squeue",
        "--me",
        "--noheader",
        "--array",
        "--Format",
        ",".join(f"{field}:|" for field in fields),
    ).splitlines()
    found = {}
    for line in lines:
        job, word, node, restarts, reason = line.split("|")[: len(fields)]
        state = State.PENDING if word in WAITING else State.RUNNING
        found[job] = ScheduledJob(state, word, node, int(restarts), reason)
    return found


def call(tool: str, *arguments: str) -> str:
    """The output of one of SLURM's tools.

    Raises:
        ValueError: the tool is missing, fails, or takes longer than a minute; one line.
    """
    try:
        done = subprocess.run(
            [tool, *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise ValueError(
            f"no {tool} on this machine: go to a login node of the cluster, or use --launcher local"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{tool} has not answered for {TIMEOUT_S} s; "
            "try again when the cluster's controller is back"
        ) from None
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ValueError(f"{tool} failed: {'; '.join(said) or f'exit status {done.returncode}'}")
    return done.stdout


def _is_given(value: object) -> bool:
    return value is not None and value is not False
