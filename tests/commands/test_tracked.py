"""Metrics, pictures and tables that the commands hand to W&B, TensorBoard and MLflow."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from seed_exp import linear, pretrain
from seed_exp.config.compose import compose, config_home
from seed_exp.engine.tracking import FollowedTracker
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
    monkeypatch.setattr(FollowedTracker, "PATIENCE_S", 100)
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


@pytest.mark.slow
def test_a_run_typed_again_with_another_tracker_sends_it_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "store"))
    train = [word for word in TRAIN if not word.startswith("student")]
    words = [*DATA, *train, "student=convnet_w2", "run_dir=run", "steps=2"]
    for tracker in ("tensorboard", "mlflow"):
        pretrain.pretrain(compose("pretrain", [*words, f"tracker={tracker}"]))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [
        (row["step"], row["convnet_w2/loss"])
        for row in map(json.loads, lines)
        if "convnet_w2/loss" in row
    ]
    assert [step for step, _ in losses] == [1, 2]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "convnet_w2")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in losses
    ]
    assert {"views", "embedding_map", "neighbours"} <= set(events.Tags()["images"])
    client = MlflowClient()
    experiment = client.get_experiment_by_name("seed_exp")
    (run,) = client.search_runs([experiment.experiment_id])
    found = client.get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in found] == losses
    assert run.data.params["moco.queue_size"] == "64"
    media = {file.path for file in client.list_artifacts(run.info.run_id, "media")}
    assert media >= {"media/views.png", "media/neighbours.png", "media/students.json"}


@pytest.mark.parametrize(
    "file", sorted((config_home() / "experiments").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_runs_of_an_experiment_stand_under_its_name(file: Path) -> None:
    assert yaml.safe_load(file.read_text())["tracker"]["group"] == file.stem
