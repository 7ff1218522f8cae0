"""A sweep without SLURM: a process of its own runs the cells, some at a time.

It outlives the terminal.

python -m seed_exp.cluster.local SCRIPT JOB NUM_CELLS PARALLEL GPUS_PER_CELL
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from seed_exp.cluster.sweep_cells import Attempt, ScheduledJob, State, last_line

PREFIX = "local-"
"""Beginning of the names of jobs that run without SLURM."""
POLL_S = 0.2
START_S = 60


def start(script: Path, job: str, *, num_cells: int, parallel: int, gpus: int) -> None:
    """Starts the process that runs the submission, and returns once it runs.

    Args:
        script: The submission's script; its neighbour logs/ takes what it leaves.
        job: Name of the submission, beginning with PREFIX.
        num_cells: Cells in the script.
        parallel: Cells that run at once.
        gpus: GPUs of each cell; 0 = every cell sees all.

    Raises:
        ValueError: it ended at once; with its last line.
    """
    log = script.parent / "logs" / f"{job}.log"
    arguments = [os.fspath(script), job, str(num_cells), str(parallel), str(gpus)]
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "seed_exp.cluster.local", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,  # what ends the terminal does not end it
        )
    deadline = time.monotonic() + START_S
    while not _lock_of(script.parent / "logs", job).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ValueError(
                f"the process that should run the cells did not start: {last_line(log)}"
            )
        time.sleep(0.02)


def active(home: Path, attempts: list[Attempt]) -> dict[str, ScheduledJob]:
    """The attempts that wait or run, here or on another machine that sees the same files."""
    alive = {}
    found = {}
    for attempt in attempts:
        logs, (submission, _, _) = home / attempt.folder, attempt.job.rpartition("_")
        if submission not in alive:
            alive[submission] = _is_held(_lock_of(logs, submission))
        cancelled = (logs / f"{attempt.job}.cancel").exists()
        if not alive[submission] or (logs / f"{attempt.job}.exit").exists():
            continue
        if (logs / f"{attempt.job}.log").exists():
            found[attempt.job] = ScheduledJob(State.RUNNING, "RUNNING")
        elif not cancelled:
            found[attempt.job] = ScheduledJob(State.PENDING, "PENDING")
    return found


def run_cells(
    script: Path,
    job: str,
    num_cells: int,
    parallel: int,
    gpus: int,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Runs the cells in their order.

    A file JOB_NUMBER.cancel keeps a cell from starting; a running one ends with a checkpoint. Once
    `stopped` is true, no cell starts any more, and all that run end so.
    """
    logs = script.parent / "logs"
    waiting, running = list(range(num_cells)), dict[int, tuple[int, subprocess.Popen[bytes]]]()
    cancelled = set[int]()
    try:
        while (waiting or running) and not stopped():
            for number, (_, process) in list(running.items()):
                if process.poll() is not None:
                    del running[number]
                elif number not in cancelled and (logs / f"{job}_{number}.cancel").exists():
                    cancelled.add(number)
                    os.killpg(process.pid, signal.SIGTERM)
            while waiting and len(running) < parallel:
                number = waiting.pop(0)
                if not (logs / f"{job}_{number}.cancel").exists():
                    slot = min(set(range(parallel)) - {slot for slot, _ in running.values()})
                    running[number] = slot, _start_cell(script, job, number, _gpus_of(slot, gpus))
            time.sleep(POLL_S)
    finally:
        for _, process in running.values():
            os.killpg(process.pid, signal.SIGTERM)
        for _, process in running.values():
            process.wait()


def _start_cell(
    script: Path, job: str, number: int, gpus: dict[str, str]
) -> subprocess.Popen[bytes]:
    with (script.parent / "logs" / f"{job}_{number}.log").open("ab") as log:
        return subprocess.Popen(
            ["bash", os.fspath(script), str(number)],
            env={**os.environ, **gpus, "SWEEP_JOB": job},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a group, so that a signal reaches all its processes
        )


def _gpus_of(slot: int, gpus: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for the cell in a slot: its share of the GPUs that this process sees."""
    if gpus == 0:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    mine = range(slot * gpus, (slot + 1) * gpus)
    names = (
        [str(number) for number in mine]
        if seen is None
        else seen.split(",")[mine.start : mine.stop]
    )
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}


def _lock_of(logs: Path, submission: str) -> Path:
    return logs / f"{submission}.lock"


def _is_held(lock: Path) -> bool:
    """Whether the process that runs the submission is alive.

    The system releases its lock, however it ends.
    """
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _main() -> None:
    script, job = Path(sys.argv[1]), sys.argv[2]
    received: list[int] = []
    # Only noted here: an exception could come while a cell starts, which nobody would end then.
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    partial = script.parent / "logs" / f"{job}.lock.partial"
    with partial.open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        partial.rename(_lock_of(script.parent / "logs", job))  # where it is seen it is held
        run_cells(script, job, *map(int, sys.argv[3:]), stopped=lambda: bool(received))
    if received:
        sys.exit(128 + received[0])


if __name__ == "__main__":
    _main()
