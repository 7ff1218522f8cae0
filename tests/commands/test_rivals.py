"""Rivals as their papers have them, through the commands: other embeddings, pairs of images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from seed_exp import distill, pretrain
from seed_exp.config.compose import compose
from seed_exp.models.student_header import read_header
from seed_exp.tools import plan as tools_plan

DATA = ["data=digits", "data.num_workers=0", "device=cpu"]
TRAIN = [*DATA, "views=digits", "tracker=files", "steps=4", "batch_size=32", "log_every=2"]
TRAIN += ["knn_bank_size=50", "knn_query_size=20", "student=convnet_w2"]
DISTILL = [*TRAIN, "teacher=run", "teacher.checkpoint=teacher"]
BAGS = ["objective=bingo_bags", "objective.queue_size=64", "objective.own_epochs=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = [*TRAIN, "moco.queue_size=64", "embedding_dim=12", "run_dir=teacher"]
        pretrain.pretrain(compose("pretrain", words))
    return home


@pytest.fixture(autouse=True)
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> Path:
    """A working directory with a teacher; puts the package's logger back afterwards."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("SEED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


def run(*words: str) -> Path:
    return distill.distill(compose("distill", [*DISTILL, *words]))


def state(folder: Path) -> dict[str, Any]:
    return tiny.last_checkpoint(folder)


def test_features_are_other_runs_and_other_caches_than_the_heads_output(home: Path) -> None:
    words = ["objective=simreg", "objective.queue_size=64", "teacher_cache=embeddings"]
    features = [*words, "teacher.embedding=features"]
    folders = [run(*words), run(*features)]
    assert folders[0].name != folders[1].name
    widths = [
        read_header(folder / "students" / "convnet_w2.safetensors")["embedding_dim"]
        for folder in folders
    ]
    assert widths == [12, 16]
    keys = [json.loads(file.read_text()) for file in (home / "embeddings").glob("*/key.json")]
    assert sorted(key.get("embedding", "head") for key in keys) == ["features", "head"]
    with pytest.raises(ValueError, match=r"teacher\.embedding was head, now features"):
        run(*features, f"run_dir={folders[0]}")
    run(*features, "teacher.reduce=pca", "teacher.embedding_dim=6", "run_dir=narrow")
    assert state(Path("narrow"))["carried"]["global.embeddings"].shape == (64, 6)


def test_pairs_are_trained_on_cached_and_planned(home: Path) -> None:
    folder = run(*BAGS)
    bags = sorted((home.parent / "cache" / "bags").iterdir())
    assert len(bags) == 1
    cached = run(*BAGS, "teacher_cache=embeddings", "run_dir=cached")
    assert sorted((home.parent / "cache" / "bags").iterdir()) == bags
    torch.testing.assert_close(
        state(cached)["networks"], state(folder)["networks"], rtol=1e-3, atol=1e-4
    )
    (job,) = tools_plan.plan(
        "distill", [*DISTILL, *BAGS], seconds=0.1, num_images=None, gpus=1
    ).jobs
    assert job.images_per_s > 0
