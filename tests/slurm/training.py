"""Trainings for the tests on the cluster: seconds of MoCo on digits, by command."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tiny
from private_slurm import PrivateSlurm

DIGITS = [
    "data=digits",
    "views=digits",
    "views.crops.global.num=2",
    "student=convnet_w2",
    "moco.queue_size=64",
    "batch_size=64",
]
DIGITS += [
    "data.num_workers=0",
    "tracker=files",
    "device=cpu",
    "log_every=5",
    "eval_every=0",
    "optimizer.warmup_epochs=0",
]
COMMAND = [sys.executable, "-m", "seed_exp.pretrain", *DIGITS]


def pretrain(slurm: PrivateSlurm, folder: Path, *options: str) -> None:
    """Trains here, without SLURM."""
    slurm.run(*COMMAND, *options, cwd=folder)


def submit(slurm: PrivateSlurm, folder: Path, command: list[str], *options: str) -> str:
    """Submits the command as one step of a plain script, as a cluster's manual would have it.

    Returns the job's number.
    """
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun --kill-on-bad-exit=1 {' '.join(map(repr, command))}\n")
    return slurm.run(
        "sbatch", "--parsable", "--output=job.out", *options, script, cwd=folder
    ).stdout.strip()


def log_of(run: Path) -> str:
    return (run / "log.txt").read_text() if (run / "log.txt").exists() else ""


def step_of(run: Path) -> int:
    """The last one in the log; 0 = none."""
    return max((int(step) for step in re.findall(r" step (\d+)/", log_of(run))), default=0)


def same_weights(first: Path, second: Path) -> None:
    """Checks that both ended with the same state, bit for bit.

    The metrics are left out: a checkpoint averages them over ranks early.
    """
    one, two = tiny.last_checkpoint(first), tiny.last_checkpoint(second)
    del one["tracker"], two["tracker"]
    tiny.assert_same(one, two)


def same_runs(first: Path, second: Path) -> None:
    """Checks that both ended with the same state and the same metrics, bit for bit."""
    tiny.assert_same(tiny.last_checkpoint(first), tiny.last_checkpoint(second))
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
