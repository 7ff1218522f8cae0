"""Ends of a job in a plain script, and whether it is started again.

Preemption, a dead node, scancel, standing still.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from private_slurm import PrivateSlurm, wait_until
from training import COMMAND, log_of, pretrain, same_runs, step_of, submit

from seed_exp.base.slurm import requeues

pytestmark = pytest.mark.slurm

SHORT = ["steps=200", "checkpoint_every=7", "run_dir=run"]
ENDLESS = ["steps=100000", "checkpoint_every=100000", "run_dir=run"]


def start(slurm: PrivateSlurm, folder: Path, options: list[str], *sbatch: str) -> str:
    """Submits a training and returns its job's number when it has made a few steps."""
    job = submit(slurm, folder, [*COMMAND, *options], *sbatch)
    wait_until(lambda: step_of(folder / "run") > 10, f"training\n{log_of(folder / 'run')}")
    return job


def test_a_preempted_job_leaves_in_its_time_of_grace_and_is_started_again(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    # SLURM takes a job that leaves before the time of grace is over for a failed one.
    job = start(slurm, tmp_path, SHORT, "--nodelist=127.0.0.1", "--exclusive")
    slurm.run(
        "sbatch",
        "--partition=urgent",
        "--nodelist=127.0.0.1",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )
    slurm.wait_for(job, "COMPLETED")
    (line,) = requeues(tmp_path / "run")
    assert (line["reason"], line["restart"], slurm.job(job)["Restarts"]) == ("preempted", 1, "1")
    pretrain(slurm, tmp_path, *SHORT[:2], "run_dir=straight")
    same_runs(tmp_path / "straight", tmp_path / "run")


def test_a_job_whose_node_dies_goes_on_and_says_so(slurm: PrivateSlurm, tmp_path: Path) -> None:
    job = start(slurm, tmp_path, SHORT, "--nodelist=127.0.0.2")
    slurm.run("scontrol", "update", "nodename=127.0.0.2", "state=down", "reason=test")
    try:
        slurm.wait_for(job, "PENDING")
    finally:
        # A failure where it registered in the meantime, and so came back by itself.
        slurm.run("scontrol", "update", "nodename=127.0.0.2", "state=resume", check=False)
    slurm.wait_for(job, "COMPLETED")
    (line,) = requeues(tmp_path / "run")
    assert (line["reason"], line["restart"]) == ("by SLURM", 1)
    assert f"was requeued by SLURM and goes on after step {line['step']}" in log_of(
        tmp_path / "run"
    )


def test_a_cancelled_job_stays_cancelled_with_its_checkpoint(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    job = start(slurm, tmp_path, ENDLESS)
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    assert requeues(tmp_path / "run") == []
    assert tiny.last_checkpoint(tmp_path / "run")["step"] > 10
    assert f"job {job} is not requeued" in log_of(tmp_path / "run")
    assert slurm.job(job)["Restarts"] == "0"


def test_a_job_that_gets_no_further_fails(slurm: PrivateSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    job = submit(slurm, tmp_path, [*COMMAND, *ENDLESS, "log_every=1"], "--hold")
    earlier = {
        "time": "2026-01-01T00:00:00+00:00",
        "job": job,
        "restart": 0,
        "reason": "SIGUSR2",
        "step": 0,
    }
    (run / "requeues.jsonl").write_text(f"{json.dumps(earlier)}\n" * 3)
    slurm.run("scontrol", "release", job)
    wait_until(lambda: step_of(run) > 0, "training")
    slurm.run("scancel", "--signal=USR2", job)
    slurm.wait_for(job, "PENDING")
    stopped = requeues(run)[-1]["step"]
    assert stopped > 0  # it had got further
    (run / "requeues.jsonl").write_text(f"{json.dumps({**earlier, 'step': stopped})}\n" * 3)
    slurm.wait_for(job, "FAILED")
    assert (
        f"job {job} is not requeued (by SLURM): it was at step {stopped} 3 times in succession"
        in (tmp_path / "job.out").read_text()
    )
