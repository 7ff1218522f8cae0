"""`python -m seed_exp.sweep` on a real SLURM.

Detached, from a snapshot, each cell once, through requeue, failure and retry.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from private_slurm import PrivateSlurm, wait_until

from seed_exp.config.compose import config_home

pytestmark = pytest.mark.slurm

GRID = [
    "data=digits",
    "views=digits",
    "views.crops.global.num=2",
    "student=convnet_w2",
    "batch_size=32",
    "moco.queue_size=64",
]
GRID += [
    "knn_bank_size=50",
    "knn_query_size=20",
    "data.num_workers=0",
    "device=cpu",
    "tracker=files",
    "log_every=10",
]
ENV = {"SEED_SLURM_GPUS_PER_NODE": "null", "SEED_SLURM_CPUS_PER_TASK": "1", "PYTHONPATH": ""}


class Project:
    """A copy of the code, in whose folder the user types."""

    def __init__(self, folder: Path, slurm: PrivateSlurm) -> None:
        self.folder, self.slurm = folder, slurm
        for part in ("seed_exp", "conf", "experiments"):
            shutil.copytree(
                config_home() / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )

    def sweep(self, action: str, *arguments: str) -> str:
        line = [
            sys.executable,
            "-m",
            "seed_exp.sweep",
            action,
            *GRID,
            "--command",
            "pretrain",
            *arguments,
        ]
        return self.slurm.run(*line, cwd=self.folder, **ENV).stdout

    def status(self, *arguments: str) -> list[dict[str, Any]]:
        (sweep,) = json.loads(self.sweep("status", *arguments, "--json"))
        cells: list[dict[str, Any]] = sweep["cells"]
        return cells

    def wait(
        self, condition: Callable[[list[dict[str, Any]]], bool], *arguments: str
    ) -> list[dict[str, Any]]:
        """The status as soon as it meets the condition."""
        seen: list[list[dict[str, Any]]] = []

        def holds() -> bool:
            seen.append(self.status(*arguments))
            return condition(seen[-1])

        try:
            wait_until(holds, "the cells", 150)
        except TimeoutError as error:
            logs = "\n".join(
                f"--- {log}\n{log.read_text()}"
                for log in self.folder.glob("runs/sweeps/*/logs/*.log")
            )
            raise AssertionError(f"{error}: {self.sweep('status', *arguments)}\n{logs}") from error
        return seen[-1]


@pytest.fixture
def project(slurm: PrivateSlurm, tmp_path: Path) -> Project:
    return Project(tmp_path / "my project", slurm)


def states(cells: list[dict[str, Any]]) -> list[str]:
    return [cell["state"] for cell in cells]


def ended(cells: list[dict[str, Any]]) -> bool:
    return not {"NEW", "PENDING", "RUNNING"} & set(states(cells))


def test_a_sweep_with_a_requeue_and_a_failure_ends_as_if_each_cell_had_run_alone(
    project: Project, slurm: PrivateSlurm, tmp_path: Path
) -> None:
    sweep = ["steps=150", "seed=0,1", "students.convnet_w2.init=null,later.safetensors"]
    printed = project.sweep("submit", *sweep, "--parallel", "2")
    assert "submitted as job" in printed
    edited = project.folder / "seed_exp/training/encoders.py"
    written = edited.read_text()
    edited.write_text("raise SystemExit('this is not what was submitted')\n")
    (project.folder / "conf/views/digits.yaml").rename(tmp_path / "digits.yaml")

    # One is asked to make room in mid-run.
    first = project.wait(lambda cells: 10 <= cells[0]["progress"].get("step", 0) < 150, *sweep)[0]
    # The signal goes to the step: to a task of an array of which others still wait, scancel sends
    # it again and again, also when the task is back.
    slurm.run("scancel", "--signal=USR2", f"{slurm.job(first['job'])['JobId']}.0")
    cells = project.wait(ended, *sweep)
    assert states(cells) == ["FINISHED", "FAILED", "FINISHED", "FAILED"]
    assert [cell["restarts"] for cell in cells] == [1, 0, 0, 0]
    assert "later.safetensors" in cells[1]["said"]
    table = project.sweep("status", *sweep)
    assert f"\n1: {cells[1]['said']}" in table
    assert "2 FINISHED, 2 FAILED" in table

    # Failed cells are started again, from the code and with the files of now; finished ones are
    # not.
    edited.write_text(written)
    (tmp_path / "digits.yaml").rename(project.folder / "conf/views/digits.yaml")
    assert "nothing to submit" in project.sweep("submit", *sweep)
    run = (
        Path(cells[0]["run"])
        if Path(cells[0]["run"]).is_absolute()
        else project.folder / cells[0]["run"]
    )
    shutil.copyfile(run / "students/convnet_w2.safetensors", project.folder / "later.safetensors")
    assert "1 seed=0 students.convnet_w2.init=later.safetensors" in project.sweep(
        "retry", *sweep, "--cell", "1"
    )
    assert "nothing to submit" in project.sweep("submit", *sweep)
    again = project.wait(ended, *sweep)
    assert states(again) == ["FINISHED", "FINISHED", "FINISHED", "FAILED"]
    assert [cell["job"] for cell in again if cell["cell"] != 1] == [
        cell["job"] for cell in cells if cell["cell"] != 1
    ]
    assert project.sweep("collect", *sweep).endswith(
        "3 of 4 cells are finished\n3 seed=1 students.convnet_w2.init=later.safetensors is FAILED\n"
    )

    straight = [
        sys.executable,
        "-m",
        "seed_exp.pretrain",
        *GRID,
        "steps=150",
        "seed=0",
        f"run_dir={tmp_path}/straight",
    ]
    subprocess.run(
        straight,
        cwd=project.folder,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    for name in ("metrics.jsonl", "students/convnet_w2.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_cancelled_cells_leave_the_queue_and_are_not_started_again(
    project: Project, slurm: PrivateSlurm
) -> None:
    sweep = ["steps=100000", "seed=0,1"]
    project.sweep("submit", *sweep, "--parallel", "1")
    cells = project.wait(lambda cells: cells[0]["progress"].get("step", 0) >= 10, *sweep)
    assert states(cells) == ["RUNNING", "PENDING"]
    assert cells[1]["said"] == "JobArrayTaskLimit"
    assert project.sweep("cancel", *sweep) == "cancelled 0 seed=0\ncancelled 1 seed=1\n"
    assert states(project.wait(ended, *sweep)) == ["CANCELLED", "CANCELLED"]
    assert slurm.run("squeue", "-h").stdout == ""
    assert "nothing to submit" in project.sweep("submit", *sweep)
    log = project.folder / "runs/sweeps" / Path(cells[0]["log"])
    assert "the same command goes on from there" in log.read_text()
