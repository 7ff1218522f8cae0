"""AdamW, mixup and averages through the commands: what is left, and who understands it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import seed_exp
from seed_exp import distill, knn, pretrain
from seed_exp.config.compose import compose
from seed_exp.engine.fleet import Fleet
from seed_exp.models.convnet import ConvNet
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.students import load_students, read_header
from seed_exp.training.encoders import build_students

TRAIN = ["data=digits", "data.num_workers=0", "device=cpu", "views=digits", "tracker=files"]
TRAIN += ["steps=4", "batch_size=32", "log_every=2", "knn_bank_size=200", "knn_query_size=100"]
DISTILL = [*TRAIN, "student=convnet_w2", "teacher=run", "objective.queue_size=64"]
PATIENT = [*DISTILL, "recipe=patient", "ema_decay=0.5", "optimizer.warmup_epochs=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a teacher and a run with averages."""
    home = tmp_path_factory.mktemp("patient")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)

        words = [*TRAIN, "student=convnet_w2", "moco.queue_size=64", "ema_decay=0.5"]
        pretrain.pretrain(compose("pretrain", [*words, "run_dir=teacher"]))
        words = ["teacher.checkpoint=teacher", "teacher_cache=cache", "evaluations=[knn]"]
        distill.distill(compose("distill", [*PATIENT, *words, "run_dir=run"]))
    return home


@pytest.fixture(autouse=True)
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> Path:
    """A copy of that working directory for one test; puts the package's logger back afterwards."""
    shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_a_run_leaves_the_average_beside_the_student_and_evaluates_both(home: Path) -> None:
    files = {path.name for path in (home / "run/students").iterdir()}
    assert files == {"convnet_w2.safetensors", "convnet_w2_ema.safetensors"}
    raw, average = (read_header(home / "run/students" / name) for name in sorted(files))
    assert raw is not None
    assert average == {**raw, "ema_decay": 0.5}
    assert raw["options"]["views.mixup"] is True
    assert raw["options"]["optimizer.name"] == "adamw"
    lines = (home / "run/metrics.jsonl").read_text().splitlines()
    assert {"convnet_w2/knn10", "convnet_w2/knn10_ema"} <= json.loads(lines[-1]).keys()
    (results,) = (home / "run/results").glob("knn-*.json")
    content = json.loads(results.read_text())
    assert content["results"].keys() == {"convnet_w2", "convnet_w2_ema"}
    assert content["protocol"]["students"]["convnet_w2_ema"]["ema_decay"] == 0.5
    (alone,) = knn.knn(compose("knn", ["run=run", "networks=[convnet_w2_ema]", "device=cpu"]))
    assert alone == "convnet_w2_ema"


def test_the_student_is_taken_where_no_name_says_that_it_is_the_average(home: Path) -> None:
    raw, average = (load_students(home / "run", [name])[name][0] for name in NAMES)
    assert not torch.equal(raw.encoder.state_dict()[KEY], average.encoder.state_dict()[KEY])
    for given, expected in ((None, raw), ("convnet_w2_ema", average)):
        found = seed_exp.load("run", given, device="cpu").encoder.state_dict()[KEY]
        assert torch.equal(found, expected.encoder.state_dict()[KEY])
    words = [*TRAIN, "students.convnet_w2.init=run", "student=convnet_w2"]
    config = compose("distill", [*words, "teacher=run", "teacher.checkpoint=teacher"])
    started = build_students(config, 128)["convnet_w2"].encoder.state_dict()[KEY]
    assert torch.equal(started, raw.encoder.state_dict()[KEY])
    record = json.loads((home / "run/config.json").read_text())["inputs"]["teacher"]
    _, header = load_students(home / "teacher", ["convnet_w2"])["convnet_w2"]
    assert record == header["sha256"]


NAMES = ("convnet_w2", "convnet_w2_ema")
KEY = next(iter(ConvNet(2).state_dict()))


def test_a_student_has_the_name_of_no_average(home: Path) -> None:
    config = compose("distill", [*PATIENT, "teacher.checkpoint=teacher"])
    config.students["convnet_w2_ema"] = config.students["convnet_w2"]
    with pytest.raises(ValueError, match="the student convnet_w2_ema has the name of the average"):
        distill.distill(config)
    assert not (home / "runs").exists()


def test_the_average_of_a_diverged_student_is_not_evaluated(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Fleet.step

    def broken(fleet: Fleet, *args: object, **options: object) -> object:
        with torch.no_grad():
            next(fleet.method.trainable["convnet_w32"].parameters()).fill_(torch.nan)
        return step(fleet, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Fleet, "step", broken)
    words = [*PATIENT, "student=[convnet_w2,convnet_w32]", "teacher.checkpoint=teacher"]
    with pytest.raises(ValueError, match=r"convnet_w32 .* diverged"):
        distill.distill(compose("distill", [*words, "run_dir=fleet", "evaluations=['knn ks=[1]']"]))
    (results,) = (home / "fleet/results").glob("knn-*.json")
    assert json.loads(results.read_text())["results"].keys() == {"convnet_w2", "convnet_w2_ema"}


def test_a_cache_gives_the_teachers_embeddings_of_mixed_views_bit_for_bit(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*PATIENT, "teacher.checkpoint=teacher"]
    plain = distill.distill(compose("distill", [*words, "run_dir=plain"]))

    def refuse(*_: object) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(Teacher, "forward", refuse)
    monkeypatch.setattr("seed_exp.training.distillation.cache_costs", lambda *_: "")
    words.append("teacher_cache=cache")
    cached = distill.distill(compose("distill", [*words, "run_dir=cached"]))
    assert (cached / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    # Other parts and batches have the same pairs.
    other = ["batch_size=16", "accumulation=2", "steps=8", "run_dir=parts"]
    distill.distill(compose("distill", [*words, *other]))
