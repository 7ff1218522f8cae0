"""SLURM as a process sees it: its rank, requeueing of its job, and the states of other jobs.

`python -m seed_exp.base.slurm -j JOB ...` answers as `sacct` does, for clusters without accounting
(see `stand_in_for_sacct`).
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seed_exp.base.files import append_json, json_lines
from seed_exp.base.stopping import WARNINGS

log = logging.getLogger("seed_exp")

MAX_IDLE_REQUEUES = 3
"""Starts in succession without a new training step after which a job is not requeued."""
_PATIENCE_S = 60
_MAX_ARRAY = 10_000
# Below the ports that the system gives to outgoing connections.
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000


# --- ranks ----------------------------------------------------------------------------------------


def torchrun_variables() -> dict[str, str]:
    """The environment variables that torchrun would set; empty unless srun started several tasks.

    A shell of `salloc` or `sbatch` knows the number of tasks too but is not one of them: only a job
    step has SLURM_STEP_NUM_TASKS.
    """
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    tasks_per_node = _repeated(env["SLURM_STEP_TASKS_PER_NODE"])
    # The port depends on the job because two jobs may share a node, and on the step because a job
    # may run several steps at once.
    port = _FIRST_PORT + (10 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % _NUM_PORTS
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node[int(env["SLURM_NODEID"])]),
        "MASTER_ADDR": env.get("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": env.get("MASTER_PORT", str(port)),
    }


def cores_of_task(usable: int) -> int | None:
    """Number of `usable` cores that belong to this task; None unless srun started several tasks.

    Some clusters bind each task to its own cores. On others `usable` is the share of all tasks of
    the machine together.
    """
    env = os.environ
    # With torchrun inside a task, its ranks share the task's cores.
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or "TORCHELASTIC_RUN_ID" in env:
        return None
    if "SLURM_CPUS_PER_TASK" in env:
        return min(usable, int(env["SLURM_CPUS_PER_TASK"]))
    return usable if usable < int(env.get("SLURM_CPUS_ON_NODE", "0")) else None


def is_first_task() -> bool:
    """Whether this process is or will be rank 0; works before the process group exists."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def first_host(nodes: str) -> str:
    """The first host of a list in SLURM's notation: gpu003 for `gpu[003-005,9],cpu1`."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]


def _repeated(counts: str) -> list[int]:
    """[8, 8, 4] for `8(x2),4`."""
    found = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(","))
    return [int(match[1]) for match in found if match for _ in range(int(match[2] or 1))]


# --- requeueing -----------------------------------------------------------------------------------


def job_id() -> str | None:
    """Id of this process's job: "12", or "12_0" for a task of an array; None outside of jobs.

    SLURM_JOB_ID alone is not enough: for one task of an array it is the number of the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def requeue(signal_name: str, folder: Path | None, step: int | None) -> None:
    """Has SLURM start this job again if SLURM stopped it. Call it when all files are closed.

    The job is requeued after a warning signal (SIGUSR1, SIGUSR2), at the time limit and when it is
    preempted. Without this, a job that ends within its grace period would count as failed. A job
    that was cancelled is not requeued, nor one that SLURM itself is about to start again. Each
    requeue is a line of requeues.jsonl in the run folder.

    Args:
        signal_name: The signal that stopped the job, such as "SIGUSR2".
        folder: The run folder; None before training.
        step: The last step that is saved there; the job continues after it. None before training.

    Raises:
        ValueError: the last `MAX_IDLE_REQUEUES` starts brought no new step.
    """
    job = job_id()
    if job is None:
        return
    try:
        reason = _reason(signal_name, _show_job(job))
        if reason is None:
            log.warning(
                "job %s is not requeued: %s was no warning from the scheduler", job, signal_name
            )
            return
        _refuse_to_stand_still(folder, step, reason)
        if folder is not None and step is not None:
            _note(folder, reason, step, int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1)
        _scontrol("requeue", job)
        log.warning("job %s is requeued (%s) and goes on after step %d", job, reason, step or 0)
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        log.warning("job %s could not be requeued (%s); submit it again to go on", job, said)


def note_restart(folder: Path, step: int) -> None:
    """Notes in requeues.jsonl that SLURM itself restarted this job (node failure, preemption).

    Raises:
        ValueError: the last `MAX_IDLE_REQUEUES` starts brought no new step.
    """
    count = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if count == 0 or any(
        line["job"] == job_id() and line["restart"] >= count for line in requeues(folder)
    ):
        return
    _refuse_to_stand_still(folder, step, "by SLURM")
    _note(folder, "by SLURM", step, count)
    log.warning("job %s was requeued by SLURM and goes on after step %d", job_id(), step)


def requeues(folder: Path) -> list[dict[str, Any]]:
    """Entries of requeues.jsonl in a run folder, oldest first.

    Each has time, job, restart (counted from 1 in each job), reason and step.
    """
    file = folder / "requeues.jsonl"
    return json_lines(file.read_text(errors="replace")) if file.exists() else []


def _reason(signal_name: str, job: dict[str, str]) -> str | None:
    """Why this process should requeue the job; None if it should not."""
    if job.get("Reason") == "TimeLimit":
        return "time limit"
    # COMPLETING: the job was cancelled and would come back, or SLURM starts it again anyway.
    if job.get("JobState") != "RUNNING":
        return None
    if job.get("PreemptTime", "None") != "None":
        return "preempted"
    return signal_name if signal_name in ("SIGUSR1", "SIGUSR2") else None


def _refuse_to_stand_still(folder: Path | None, step: int | None, reason: str) -> None:
    if folder is None or step is None:
        # Training has not begun, so there is no step to compare. Preemption is no fault of the job.
        idle = 0 if reason == "preempted" else int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        where = "before training began"
    else:
        steps = [line["step"] for line in requeues(folder)]
        idle = next(
            (num for num, earlier in enumerate(reversed(steps)) if earlier != step), len(steps)
        )
        where = f"at step {step}"
    if idle >= MAX_IDLE_REQUEUES:
        raise ValueError(
            f"job {job_id()} is not requeued ({reason}): it was {where} {idle} times in "
            "succession; give it more time, or set checkpoint_every to a smaller number of steps"
        )


def _note(folder: Path, reason: str, step: int, restart: int) -> None:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    line = {"time": now, "job": job_id(), "restart": restart, "reason": reason, "step": step}
    append_json(folder / "requeues.jsonl", line)


# --- asking SLURM ---------------------------------------------------------------------------------


def _scontrol(*arguments: str) -> str:
    # SLURM sends a warning to all processes of a step, often again and again: the child inherits
    # the mask, and is not ended by it. What comes meanwhile reaches this process afterwards.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    try:
        return subprocess.run(
            ["scontrol", *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        ).stdout
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _show_job(job: str) -> dict[str, str]:
    return _fields(_scontrol("--oneliner", "show", "job", job))


def _fields(line: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^| )([\w:/]+)=(\S*)", line))


@contextmanager
def stand_in_for_sacct() -> Iterator[None]:
    """Puts a `sacct` that asks `scontrol` on PATH for the block, if the real one does not work.

    submitit learns only from `sacct` that a job ended without a result, and waits for ever without.
    """
    works = (
        shutil.which("sacct") is not None
        and subprocess.run(["sacct"], capture_output=True, check=False).returncode == 0
    )
    if works or shutil.which("scontrol") is None:
        yield
        return
    before = os.environ["PATH"]
    with tempfile.TemporaryDirectory(prefix="seed-sacct-") as folder:
        script = Path(folder) / "sacct"
        script.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m seed_exp.base.slurm "$@"\n'
        )
        script.chmod(0o755)
        os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before


def accounts(jobs: list[str]) -> Iterator[str]:
    """Lines of `sacct -o JobID,State,NodeList --parsable2` for these jobs.

    SLURM forgets a job some minutes after its end (MinJobAge); unknown jobs are reported as ENDED.
    """
    yield "JobID|State|NodeList"
    for job in jobs:
        yield f"{job}|ENDED|"
        yield f"{job}_[0-{_MAX_ARRAY - 1}]|ENDED|"  # the lines below are read later and win
        try:
            shown = _scontrol("--oneliner", "show", "job", job)
        except subprocess.CalledProcessError as error:
            if "Invalid job id" not in error.stderr:
                raise
            continue
        for fields in map(_fields, shown.splitlines()):
            task = fields.get("ArrayTaskId")
            name = (
                fields["JobId"]
                if task is None
                else f"{job}_{task if task.isdigit() else f'[{task}]'}"
            )
            yield f"{name}|{fields['JobState']}|{fields.get('NodeList', '')}"


def main() -> None:
    """Prints the lines of `accounts` for the job after each -j."""
    try:
        print(
            "\n".join(
                accounts(
                    [job for flag, job in zip(sys.argv, sys.argv[1:], strict=False) if flag == "-j"]
                )
            )
        )
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: scontrol: {error.stderr.strip()}")


if __name__ == "__main__":
    main()
