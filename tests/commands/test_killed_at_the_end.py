"""Kills between the last checkpoint and the end: the same command makes what is missing."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import forks
import pytest

from seed_exp import linear, pretrain
from seed_exp.config.compose import compose
from seed_exp.engine.tracking import WandbTracker

DATA = ["data=digits", "data.num_workers=0", "device=cpu", "batch_size=32"]
TRAIN = [*DATA, "views=digits", "student=convnet_w2", "moco.queue_size=64", "steps=4"]
TRAIN += ["log_every=1", "knn_bank_size=200", "knn_query_size=100"]
LINEAR = [*DATA, "views=linear_digits", "epochs=1", "lrs=[1]"]
WANDB = ["tracker=wandb", "tracker.mode=offline"]
SHOWN = {"convnet_w2/embedding_map", "convnet_w2/neighbours", "students"}


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setattr(WandbTracker, "PATIENCE_S", 100)
    monkeypatch.chdir(tmp_path)


def killed_at(point: str, command: str, options: list[str]) -> None:
    helper = Path(__file__).parents[1] / "kill_me.py"
    process = forks.run(
        [sys.executable, str(helper), "at", point, command, *options], capture_output=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()


def media(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "media" / "index.json").read_text())
    return found


def sent(folder: Path) -> list[tuple[int, set[str]]]:
    """Steps that W&B got, with the keys of pictures and tables in them."""
    (run_id,) = json.loads((folder / "wandb.json").read_text())["ids"].values()
    rows = []
    for path in sorted(folder.glob(f"wandb/*run-*-{run_id}/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        text = forks.run(command, capture_output=True, check=True, text=True).stdout
        records = [json.loads(line) for line in text.splitlines()]
        rows += [one["history"]["item"] for one in records if one["type"] == "history"]
    return [
        (row["_step"], {key.removesuffix("._type") for key in row if key.endswith("._type")})
        for row in rows
    ]


@pytest.mark.parametrize(
    "point",
    [
        "monitor:show_results",
        pytest.param("monitor:neighbours_gallery", marks=pytest.mark.slow),
    ],
)
def test_maps_neighbours_and_table_of_a_training_appear_at_its_last_step(
    point: str, tmp_path: Path
) -> None:
    options = [*TRAIN, *WANDB, "run_dir=run"]
    killed_at(f"seed_exp.training.{point}", "pretrain", options)
    assert (tmp_path / "run" / "checkpoints" / "step_00000004.pt").exists()
    assert not SHOWN & (media(tmp_path / "run").keys() - {"convnet_w2/embedding_map"})
    pretrain.pretrain(compose("pretrain", options))
    found = media(tmp_path / "run")
    assert {key: entry["step"] for key, entry in found.items()} == {
        "views": 0,
        **dict.fromkeys(SHOWN, 4),
    }
    for entry in found.values():
        assert "picture" not in entry or (tmp_path / "run" / "media" / entry["picture"]).exists()
    steps = sent(tmp_path / "run")
    assert [step for step, _ in steps] == [0, 1, 2, 3, 4]
    assert steps[-1][1] == {"embedding_map", "neighbours", "students"}


@pytest.mark.slow
def test_the_table_of_a_linear_evaluation_appears_at_its_last_step(tmp_path: Path) -> None:
    pretrain.pretrain(compose("pretrain", [*TRAIN, "tracker=files", "run_dir=run"]))
    options = [*LINEAR, *WANDB, "run=run"]
    killed_at("seed_exp.engine.tracking:FileTracker.log_table", "linear", options)
    (folder,) = (tmp_path / "run" / "linear").iterdir()
    assert not (folder / "media").exists()
    results = linear.linear(compose("linear", options))
    (entry,) = media(folder).values()
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert entry["step"] == last["step"] > 0
    assert entry["rows"] == [[name, *row.values()] for name, row in results.items()]
    assert sent(folder)[-1] == (last["step"], {"linear"})
