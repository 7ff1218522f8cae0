"""The launcher profiles of conf/hydra/launcher, as Hydra composes them; `tests/slurm` runs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from seed_exp import preview
from seed_exp.config.compose import VERSION_BASE, config_home

PROFILES = sorted(
    file.stem for file in (config_home() / "conf" / "hydra" / "launcher").glob("*.yaml")
)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Changes to another working directory, and removes variables about clusters."""
    for name in (
        "PARTITION",
        "ACCOUNT",
        "QOS",
        "CONSTRAINT",
        "EXCLUDE",
        "MINUTES",
        "MEM_GB",
        "CPUS_PER_TASK",
        "PARALLEL",
    ):
        monkeypatch.delenv(f"SEED_SLURM_{name}", raising=False)
    for name in ("GPUS_PER_NODE", "TASKS_PER_NODE", "WARN_SECONDS", "SETUP"):
        monkeypatch.delenv(f"SEED_SLURM_{name}", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)


def launcher(profile: str, *options: str) -> dict[str, Any]:
    with initialize_config_dir(str(config_home() / "conf"), version_base=VERSION_BASE):
        config = compose(
            "distill", [f"hydra/launcher={profile}", *options], return_hydra_config=True
        )
        config.hydra.job.name = "distill"
        found: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    ("profile", "shape"),
    [("slurm", (1, 1, 1)), ("slurm_8gpu", (1, 8, 8)), ("slurm_2node", (2, 8, 8))],
)
def test_one_task_per_gpu(profile: str, shape: tuple[int, int, int]) -> None:
    found = launcher(profile)
    assert (found["nodes"], found["tasks_per_node"], found["gpus_per_node"]) == shape
    assert found["additional_parameters"] == {"requeue": True}
    assert found["signal_delay_s"] == 120
    assert [
        found[key] for key in ("partition", "account", "qos", "constraint", "exclude", "mem_gb")
    ] == [None] * 6
    other = launcher(profile, "hydra.launcher.tasks_per_node=4")
    assert (other["tasks_per_node"], other["gpus_per_node"]) == (4, 4)


def test_what_a_cluster_asks_for_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {
        "PARTITION": "gpu",
        "ACCOUNT": "lab",
        "QOS": "low",
        "CONSTRAINT": "a100|h100",
        "EXCLUDE": "n[1-2]",
        "MINUTES": "90",
    }
    given |= {
        "MEM_GB": "0",
        "CPUS_PER_TASK": "12",
        "PARALLEL": "3",
        "GPUS_PER_NODE": "null",
        "TASKS_PER_NODE": "2",
    }
    given |= {"WARN_SECONDS": "300", "SETUP": "module load cuda && source .venv/bin/activate"}
    for name, value in given.items():
        monkeypatch.setenv(f"SEED_SLURM_{name}", value)
    found = launcher("slurm_2node")
    expected = {
        "partition": "gpu",
        "account": "lab",
        "qos": "low",
        "constraint": "a100|h100",
        "exclude": "n[1-2]",
    }
    expected |= {
        "timeout_min": 90,
        "mem_gb": 0,
        "cpus_per_task": 12,
        "array_parallelism": 3,
        "gpus_per_node": None,
    }
    expected |= {"tasks_per_node": 2, "signal_delay_s": 300}
    assert {key: found[key] for key in expected} == expected
    assert found["setup"][-1] == given["SETUP"]
    assert launcher("slurm", "hydra.launcher.partition=other")["partition"] == "other"


def test_the_jobs_of_a_sweep_run_here_one_after_the_other_where_there_is_no_slurm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = [
        "-m",
        "hydra/launcher=slurm",
        "hydra.launcher.partition=gpu",
        "data=digits",
        "views=digits",
        "num_images=1",
    ]
    monkeypatch.setattr(
        sys, "argv", ["preview.py", *line, "data.num_workers=0", "seed=0,1", "output=${seed}.png"]
    )
    preview.main()
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["0.png", "1.png"]
    assert (
        "no SLURM here (no sbatch on PATH): hydra/launcher=local instead of hydra/launcher=slurm"
        in capsys.readouterr().err
    )


def test_every_profile_composes() -> None:
    assert PROFILES == ["local", "slurm", "slurm_2node", "slurm_8gpu"]
    assert launcher("local")["_target_"].endswith("BasicLauncher")
