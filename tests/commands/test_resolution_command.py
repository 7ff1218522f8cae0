"""Views whose size changes over time, through the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from seed_exp import distill, pretrain, preview
from seed_exp.config.compose import compose
from seed_exp.config.schema import StudentConfig
from seed_exp.evaluation.setup import eval_options
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.students import build_student, save_student
from seed_exp.training.advice import resolution_advice

DIGITS = ["data=digits", "views=digits", "data.num_workers=0", "device=cpu", "tracker=files"]
TRAIN = [*DIGITS, "batch_size=32", "log_every=1", "knn_bank_size=50", "knn_query_size=20"]
PHASES = "views.resolution=[[0,16],[2,24,32]]"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def words() -> list[str]:
    """The command line of a short distillation from a teacher of our own."""
    config, views = StudentConfig("convnet_w2"), compose("distill", DIGITS).views
    header: Any = {"eval_views": eval_options(views)}
    save_student(Path("teacher.safetensors"), build_student(config, 128), config, header)
    teacher = ["teacher=run", "teacher.checkpoint=teacher.safetensors"]
    return [*TRAIN, *teacher, "student=convnet_w2", "objective.queue_size=64"]


def sizes(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["view_size"] for line in lines if "view_size" in line]


def test_a_cache_has_the_embeddings_of_each_size_bit_for_bit(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [*words, "steps=5", PHASES]
    plain = distill.distill(compose("distill", [*short, "run_dir=plain"]))
    assert sizes(plain) == [16, 16, 24, 32, 24]
    short.append("teacher_cache=cache")
    distill.distill(compose("distill", [*short, "run_dir=filling"]))
    (key,) = Path("cache").glob("*/key.json")
    assert json.loads(key.read_text())["views"]["resolution"] == [[0, 16], [2, 24, 32]]
    with monkeypatch.context() as patched:
        patched.setattr("seed_exp.training.distillation.cache_costs", lambda *_: "")
        patched.setattr(Teacher, "forward", None)
        cached = distill.distill(compose("distill", [*short, "run_dir=cached"]))
    assert (plain / "metrics.jsonl").read_bytes() == (cached / "metrics.jsonl").read_bytes()
    distill.distill(compose("distill", [*words, "steps=1", "run_dir=one", "teacher_cache=cache"]))
    (other,) = {*Path("cache").glob("*/key.json")} - {key}
    assert "resolution" not in json.loads(other.read_text())["views"]
    assert sizes(Path("one")) == []


def test_the_queue_begins_with_views_of_the_first_size(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    forward = Teacher.forward

    def recorded(teacher: Teacher, views: Tensor) -> Tensor:
        seen.append((len(views), views.shape[-1]))
        return forward(teacher, views)

    monkeypatch.setattr(Teacher, "forward", recorded)
    words += ["steps=3", "objective.queue_init=teacher", "views.resolution=[[0,16],[2,24]]"]
    distill.distill(compose("distill", words))
    assert seen == [(64, 16), (32, 16), (32, 16), (32, 24)]


def test_epochs_have_their_sizes_in_pretraining_and_in_a_preview() -> None:
    phases = "views.resolution=[[0,16],[1,32,48]]"
    words = [*TRAIN, phases, "student=timm/test_vit", "epochs=3", "batch_size=700"]
    words += ["moco.queue_size=1024", "run_dir=run", "eval_every=0"]
    run = pretrain.pretrain(compose("pretrain", words))
    assert sizes(run) == [16] * 2 + [32] * 2 + [48] * 2
    heights = []
    for epoch in range(3):
        options = [*DIGITS[:2], phases, f"epoch={epoch}", "num_images=1", "output=views.png"]
        preview.preview(compose("preview", options))
        with Image.open("views.png") as picture:
            heights.append(picture.height)
    assert [height - heights[0] for height in heights] == [0, 16, 32]


def test_a_size_that_a_student_does_not_take_is_an_error_before_training(words: list[str]) -> None:
    config = compose("distill", [*words, "steps=5", PHASES, "student=timm/test_vit"])
    with pytest.raises(ValueError, match="student test_vit does not take views of 24 x 24 pixels"):
        distill.distill(config)
    assert not Path("runs").exists()


def test_phases_that_do_not_end_at_the_own_size_are_pointed_out() -> None:
    words = ["data=digits", "views=digits", "steps=9"]
    assert resolution_advice(compose("distill", words)) == []
    assert resolution_advice(compose("distill", [*words, PHASES])) == []
    (advice,) = resolution_advice(compose("distill", [*words, "views.resolution=[[0,16],[5,24]]"]))
    assert advice.startswith("views.resolution ends with global views of 24 pixels")
    assert "choose views.crops.global.size=24, or another last phase" in advice
