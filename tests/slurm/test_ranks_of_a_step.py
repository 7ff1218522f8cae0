"""Tasks that srun starts are ranks of one training; what merely runs inside a job is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from private_slurm import PrivateSlurm
from training import submit

pytestmark = pytest.mark.slurm

SCRIPT = str(Path(__file__).parent / "train_tiny.py")
TESTS = str(Path(__file__).parents[1])


def train(slurm: PrivateSlurm, folder: Path, *options: str) -> str:
    folder.mkdir()
    return submit(
        slurm,
        folder,
        [sys.executable, SCRIPT, str(folder)],
        "--export=ALL,PYTHONPATH=" + path(slurm),
        *options,
    )


def left_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Files that the tasks of a job left, by the name that each gave itself."""
    return {
        file.stem: torch.load(file, weights_only=True) for file in sorted(folder.glob("rank*.pt"))
    }


def path(slurm: PrivateSlurm) -> str:
    return ":".join(filter(None, [TESTS, slurm.env.get("PYTHONPATH")]))


def test_two_tasks_and_two_nodes_train_as_one_process_does(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    shapes = {
        "one": ["--ntasks=1"],
        "tasks": ["--nodes=1", "--ntasks=2"],
        "nodes": ["--nodes=2", "--ntasks-per-node=1"],
    }
    for job in [train(slurm, tmp_path / name, *options) for name, options in shapes.items()]:
        slurm.wait_for(job, "COMPLETED")
    alone, tasks, nodes = (left_in(tmp_path / name) for name in shapes)
    assert list(alone) == ["rank 0 of 1, 1 on its node"]
    assert list(tasks) == ["rank 0 of 2, 2 on its node", "rank 1 of 2, 2 on its node"]
    assert list(nodes) == ["rank 0 of 2, 1 on its node", "rank 1 of 2, 1 on its node"]
    assert [result["node"] for result in nodes.values()] == slurm.nodes
    (expected,) = alone.values()
    for result in [*tasks.values(), *nodes.values()]:
        for key, value in tiny.flat(expected["weights"]).items():
            torch.testing.assert_close(
                tiny.flat(result["weights"])[key], value, rtol=1e-5, atol=1e-5
            )
    one, two, three = (
        tiny.last_checkpoint(tmp_path / name)["step"] for name in ("one", "tasks", "nodes")
    )
    assert one == two == three == 12


def test_the_batch_script_of_several_tasks_is_one_process(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{sys.executable} {SCRIPT} {tmp_path}\n")
    export = "--export=ALL,PYTHONPATH=" + path(slurm)
    job = slurm.run(
        "sbatch", "--parsable", "--ntasks=2", "--output=job.out", export, script, cwd=tmp_path
    ).stdout.strip()
    slurm.wait_for(job, "COMPLETED")
    assert [file.stem for file in tmp_path.glob("rank*.pt")] == ["rank 0 of 1, 1 on its node"]
