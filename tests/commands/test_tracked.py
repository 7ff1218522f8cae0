"""Metrics, pictures and tables that the commands hand to Weights & Biases."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from seed_exp import linear, pretrain
from seed_exp.config.compose import compose, config_home
from seed_exp.engine.tracking import WandbTracker
from seed_exp.engine.wandb_process import last_step

DATA = ["data=digits", "data.num_workers=0", "device=cpu", "batch_size=32"]
TRAIN = [
    "views=digits",
    "student=[convnet_w2,convnet_w32]",
    "moco.queue_size=64",
    "steps=4",
    "log_every=1",
    "run_dir=fleet",
]
TRAIN += ["knn_bank_size=200", "knn_query_size=100"]
LINEAR = ["run=fleet", "views=linear_digits", "epochs=1", "lrs=[1]", "tracker=wandb"]


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setattr(WandbTracker, "PATIENCE_S", 100)
    monkeypatch.chdir(tmp_path)


def test_a_fleet_and_its_linear_evaluation_leave_a_run_per_student(tmp_path: Path) -> None:
    pretrain.pretrain(compose("pretrain", [*DATA, *TRAIN]))
    linear.linear(compose("linear", [*DATA, *LINEAR]))
    (evaluation,) = (tmp_path / "fleet" / "linear").iterdir()
    pictures = {
        f"{name}/{picture}"
        for name in ("convnet_w2", "convnet_w32")
        for picture in ("embedding_map", "neighbours")
    }
    shown = {"views", "students", *pictures}
    for folder, command, steps, media in (
        (tmp_path / "fleet", "pretrain", 4, shown),
        (evaluation, "linear", 44, {"linear"}),
    ):
        about = json.loads((folder / "wandb.json").read_text())
        assert about["job_type"] == command
        assert about["ids"].keys() == {"convnet_w2", "convnet_w32"}
        assert [last_step(folder, run_id) for run_id in about["ids"].values()] == [steps, steps]
        assert json.loads((folder / "media" / "index.json").read_text()).keys() == media
    assert (
        json.loads((tmp_path / "fleet" / "wandb.json").read_text())["group"]
        == "convnet_w2+convnet_w32-moco_v2-digits-digits"
    )


@pytest.mark.parametrize(
    "file", sorted((config_home() / "experiments").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_runs_of_an_experiment_stand_under_its_name(file: Path) -> None:
    assert yaml.safe_load(file.read_text())["tracker"]["group"] == file.stem
