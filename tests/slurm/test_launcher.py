"""`-m hydra/launcher=slurm` on a cluster without accounts.

Sweeps, requeues in the middle, errors that reach the terminal.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from omegaconf import OmegaConf
from PIL import Image
from private_slurm import PrivateSlurm, wait_until
from training import DIGITS, log_of, pretrain, same_runs, same_weights, step_of

from seed_exp.base.slurm import requeues
from seed_exp.config.search import number_to_optimise
from seed_exp.data.order import SampleOrder

pytestmark = pytest.mark.slurm


def sweep(
    slurm: PrivateSlurm, folder: Path, *options: str, launcher: str = "slurm", **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs `pretrain -m hydra/launcher=...` on tasks of one CPU each and no GPU.

    Returns when the last job has ended.
    """
    line = [
        sys.executable,
        "-m",
        "seed_exp.pretrain",
        "-m",
        f"hydra/launcher={launcher}",
        *DIGITS,
        *options,
    ]
    cluster = {
        "SEED_SLURM_CPUS_PER_TASK": "1",
        "SEED_SLURM_GPUS_PER_NODE": "null",
        "SEED_SLURM_MINUTES": "5",
    }
    return slurm.run(*line, cwd=folder, check=False, **{**cluster, **env})


def meanwhile(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_a_sweep_of_three_cells_one_of_them_requeued_in_mid_epoch(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    def warn() -> None:
        # The last task of an array has the array's own number: requeueing by that number would
        # start all of them again.
        wait_until(lambda: step_of(tmp_path / "2") > 0, "training")
        (last,) = [job for job in slurm.jobs() if job.get("ArrayTaskId") == "2"]
        assert last["JobId"] == last["ArrayJobId"]
        slurm.run("scancel", "--signal=USR2", f"{last['ArrayJobId']}_2")

    warning = meanwhile(warn)
    done = sweep(
        slurm, tmp_path, "seed=0,1,2", "run_dir=${seed}", "steps=100", "checkpoint_every=1000"
    )
    warning.join()
    assert (done.returncode, done.stdout) == (0, "")
    assert [len(requeues(tmp_path / seed)) for seed in "012"] == [0, 0, 1]
    (line,) = requeues(tmp_path / "2")
    assert line["reason"] == "SIGUSR2"
    assert line["step"] % 22 != 0
    assert f"is requeued (SIGUSR2) and goes on after step {line['step']}" in log_of(tmp_path / "2")
    assert {job["Restarts"] for job in slurm.jobs() if job.get("ArrayTaskId") in ("0", "1")} == {
        "0"
    }
    pretrain(slurm, tmp_path, "seed=2", "run_dir=straight", "steps=100", "checkpoint_every=1000")
    same_runs(tmp_path / "straight", tmp_path / "2")


def test_two_nodes_stop_together_and_go_on_together(slurm: PrivateSlurm, tmp_path: Path) -> None:
    def warn() -> None:
        wait_until(lambda: step_of(tmp_path / "broken") > 0, "training")
        slurm.run("scancel", "--signal=USR2", slurm.jobs()[-1]["JobId"])

    options = ["steps=60", "checkpoint_every=1000"]
    two_nodes = {"launcher": "slurm_2node", "SEED_SLURM_TASKS_PER_NODE": "1"}
    warning = meanwhile(warn)
    done = sweep(slurm, tmp_path, "run_dir=broken", *options, **two_nodes)
    warning.join()
    assert done.returncode == 0, done.stderr
    assert [line["reason"] for line in requeues(tmp_path / "broken")] == ["SIGUSR2"]
    done = sweep(slurm, tmp_path, "run_dir=straight", *options, **two_nodes)
    assert done.returncode == 0, done.stderr
    same_weights(tmp_path / "straight", tmp_path / "broken")


def test_a_failing_cell_says_which_it_is_and_why_and_the_others_end(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    done = sweep(slurm, tmp_path, "batch_size=2000,64", "run_dir=${batch_size}", "steps=5")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "batch_size=2000 exceeds the 1437 images" in line
    assert "[job 0: " in line
    assert "batch_size=2000" in line.partition("[job 0: ")[2]
    assert "done: 64" in log_of(tmp_path / "64")


def test_an_error_in_rank_1_only_is_the_error_of_the_job(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    bad = int(SampleOrder(64, 16, 0, rank=1, world_size=2).batch(1)[1][0])
    for number in range(64):
        Image.new("RGB", (32, 32), (3 * number, number, 0)).save(tmp_path / f"{number:03}.png")
    (tmp_path / f"{bad:03}.png").write_bytes(b"broken")
    options = [
        "data=image_folder",
        f"data.root={tmp_path}",
        "data.on_error=raise",
        "batch_size=16",
        "steps=12",
        "run_dir=run",
    ]
    done = sweep(slurm, tmp_path, *options, "hydra.launcher.tasks_per_node=2")
    assert done.returncode == 1
    assert f"error (rank 1): cannot decode image '{tmp_path}/{bad:03}.png'" in done.stderr


def test_a_job_that_leaves_no_result_ends_the_sweep(slurm: PrivateSlurm, tmp_path: Path) -> None:
    def cancel() -> None:
        wait_until(lambda: step_of(tmp_path / "run") > 0, "training")
        slurm.run("scancel", slurm.jobs()[-1]["JobId"])

    cancelling = meanwhile(cancel)
    done = sweep(
        slurm, tmp_path, "run_dir=run", "steps=100000"
    )  # sacct says nothing here: without ours it waits for ever
    cancelling.join()
    assert done.returncode == 1
    assert done.stderr.startswith("error: Job ")
    assert "has not produced any output (state: CANCELLED)" in done.stderr


def test_a_job_gets_the_gpus_that_its_profile_asks_for(slurm: PrivateSlurm, tmp_path: Path) -> None:
    setup = {"SEED_SLURM_SETUP": "srun --ntasks=1 env > env.txt", "SEED_SLURM_PARTITION": "urgent"}
    done = sweep(
        slurm, tmp_path, "run_dir=run", "steps=2", "hydra.launcher.gpus_per_node=2", **setup
    )
    assert done.returncode == 0, done.stderr
    variables = (tmp_path / "env.txt").read_text().splitlines()
    assert {"CUDA_VISIBLE_DEVICES=0,1", "SLURM_JOB_PARTITION=urgent"} <= set(variables)
    assert tiny.last_checkpoint(tmp_path / "run")["step"] == 2


def test_a_search_runs_its_trials_as_jobs_and_gets_their_numbers(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    searched = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=3"]
    space = "optimizer.lr=tag(log,interval(0.003,1))"
    done = sweep(slurm, tmp_path, *searched, space, "steps=5")
    assert done.returncode == 0, done.stderr
    runs = [path.parent for path in (tmp_path / "runs").glob("pretrain/*/done.json")]
    assert len(runs) == 6
    found = OmegaConf.load(tmp_path / "runs" / "optimization_results.yaml")
    best = max(number_to_optimise("pretrain", folder) for folder in runs)
    assert found.best_value == pytest.approx(best)
