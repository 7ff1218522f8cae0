from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seed_exp.base.files import file_hash
from seed_exp.config.schema import CropConfig, DataConfig, StudentConfig, ViewsConfig
from seed_exp.engine.run import num_workers_of
from seed_exp.evaluation.setup import eval_options, load_frozen, load_labelled
from seed_exp.models.students import build_student, save_student

VIEWS = ViewsConfig(
    "train",
    {"global": CropConfig(24, 2)},
    eval_size=28,
    eval_resize=30,
    mean=[0.1] * 3,
    std=[0.2] * 3,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two students."""
    config = StudentConfig("convnet_w2")
    for name, step in (("a", 10), ("b", 20)):
        facts = {
            "command": "distill",
            "step": step,
            "data": "digits",
            "eval_views": eval_options(VIEWS),
        }
        save_student(
            tmp_path / "run" / "students" / f"{name}.safetensors",
            build_student(config, 4),
            config,
            facts,
        )
    return tmp_path / "run"


def test_students_come_frozen_with_their_record_and_views(run: Path) -> None:
    frozen = load_frozen(run, None, torch.device("cpu"))
    assert frozen.students.keys() == frozen.record.keys() == {"a", "b"}
    for student in frozen.students.values():
        assert not any(module.training for module in student.modules())
        assert not any(parameter.requires_grad for parameter in student.parameters())
    assert eval_options(frozen.views) == eval_options(VIEWS)
    record = frozen.record["b"]
    assert (record["network"], record["step"], record["command"]) == ("convnet_w2", 20, "distill")
    assert record["sha256"] == file_hash(run / "students" / "b.safetensors")


def test_some_students_or_one_file(run: Path) -> None:
    assert list(load_frozen(run, ["b"], torch.device("cpu")).students) == ["b"]
    assert list(
        load_frozen(run / "students" / "a.safetensors", None, torch.device("cpu")).students
    ) == ["a"]
    with pytest.raises(ValueError, match="unknown student of"):
        load_frozen(run, ["c"], torch.device("cpu"))


def test_digits_are_labelled() -> None:
    sources = load_labelled(DataConfig("digits"))
    assert sources.num_classes == 10
    assert len(sources.train) > len(sources.val) > 0


def image_folder(root: Path, split: str, classes: list[str]) -> None:
    for name in classes:
        (root / split / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / split / name / "image.png")


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        image_folder(tmp_path, split, ["."])
    with pytest.raises(ValueError, match="needs labels"):
        load_labelled(DataConfig("image_folder", root=str(tmp_path)))


def test_labels_that_training_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Labelled:
        def __init__(self, labels: list[int]) -> None:
            self.labels = np.array(labels, np.int64)

    sources = {"train": Labelled([0, 1, 2]), "val": Labelled([0, 3])}
    monkeypatch.setattr("seed_exp.evaluation.setup.load_source", lambda _, split: sources[split])
    with pytest.raises(
        ValueError, match="validation labels go from 0 to 3, training labels from 0 to 2"
    ):
        load_labelled(DataConfig("digits"))
    sources["val"] = Labelled([-1, 2])
    with pytest.raises(ValueError, match="go from -1 to 2"):
        load_labelled(DataConfig("digits"))


def test_workers_are_as_asked_for() -> None:
    assert num_workers_of(DataConfig("digits", num_workers=3)) == 3
    assert num_workers_of(DataConfig("digits", num_workers=0)) == 0
    assert num_workers_of(DataConfig("digits")) >= 0
