"""Teachers are frozen and come from official files or our own runs; what cannot work is refused before a download."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from seed_exp.config.schema import StudentConfig, TeacherConfig
from seed_exp.files import file_hash
from seed_exp.models import teachers
from seed_exp.models.convnet import ConvNet
from seed_exp.models.heads import projection_head
from seed_exp.models.students import build_student, save_student
from seed_exp.models.teacher_ssl import TEACHER_SSL
from seed_exp.models.teachers import NETWORKS, TEACHERS, Teacher, build_teacher

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(("group", "registry"), [("teacher", TEACHERS), ("teacher_ssl", TEACHER_SSL)])
def test_option_files_and_registry_are_the_same_set(group: str, registry: dict[str, object]) -> None:
    assert {path.stem for path in (CONF / group).glob("*.yaml")} == set(registry)


def test_option_files_say_what_the_registry_says() -> None:
    for name, spec in TEACHERS.items():
        text = (CONF / "teacher" / f"{name}.yaml").read_text()
        assert re.findall(r"^name: (.*)$", text, re.MULTILINE) == [name]
        assert re.findall(r"^  - override /teacher_ssl@_global_\.teacher_ssl: (.*)$", text, re.MULTILINE) == (
            [spec.teacher_ssl] if spec.teacher_ssl else []
        )
        if spec.network:
            assert f", {spec.epochs} epochs" in text
            assert f"ImageNet-1k: {spec.top1 or 'unknown'}." in text
            assert f"weights: {spec.licence or 'unknown'}." in text
            assert spec.network in NETWORKS
        if spec.url:
            assert f"File: {spec.url.rsplit('/', 1)[1]}, downloaded" in text


def _teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(ConvNet(2), projection_head(16, None, 4), 4)


def test_a_teacher_stays_frozen_whatever_the_caller_does() -> None:
    teacher = _teacher()
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    assert teacher.train() is teacher
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    embeddings = teacher(torch.randn(8, 3, 32, 32))
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(8))
    assert all(torch.equal(before[key], tensor) for key, tensor in teacher.state_dict().items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert teacher(torch.randn(2, 3, 32, 32)).dtype == torch.float32


EVAL_VIEWS = {"eval_size": 32, "eval_resize": 32, "mean": [0.1] * 3, "std": [0.2] * 3}


def test_a_network_of_our_own_run_is_a_teacher(tmp_path: Path) -> None:
    config = StudentConfig(network="convnet_w2")
    student = build_student(config, 8)
    student(torch.randn(4, 3, 32, 32))
    save_student(tmp_path / "students" / "a.safetensors", student.eval(), config, {"eval_views": EVAL_VIEWS})
    images = torch.randn(2, 3, 32, 32)
    for place in (tmp_path, tmp_path / "students" / "a.safetensors"):
        teacher = build_teacher(TeacherConfig(name="run", checkpoint=str(place)), "swav")
        assert teacher.embedding_dim == 8
        assert teacher.normalisation == ([0.1] * 3, [0.2] * 3)
        assert teacher.fingerprint == file_hash(tmp_path / "students" / "a.safetensors")
        assert not any(module.training for module in teacher.modules())
        assert torch.equal(teacher(images), student(images))
    save_student(tmp_path / "students" / "b.safetensors", build_student(config, 9), config, {"eval_views": EVAL_VIEWS})
    with pytest.raises(ValueError, match=r"holds several networks; choose one with teacher\.student=a\|b"):
        build_teacher(TeacherConfig(name="run", checkpoint=str(tmp_path)), "swav")
    assert build_teacher(TeacherConfig(name="run", checkpoint=str(tmp_path), student="b"), "swav").embedding_dim == 9
    with pytest.raises(ValueError, match=r"'c'.*Known: a, b"):
        build_teacher(TeacherConfig(name="run", checkpoint=str(tmp_path), student="c"), "swav")


def test_what_cannot_work_is_refused_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "download", None)
    with pytest.raises(ValueError, match="unknown teacher 'swav_r51'; did you mean 'swav_r50'"):
        build_teacher(TeacherConfig(name="swav_r51"), "swav")
    with pytest.raises(ValueError, match=r"simclr_r50 has no lasting address.*teacher\.checkpoint=PATH"):
        build_teacher(TeacherConfig(name="simclr_r50"), "simclr")
    with pytest.raises(ValueError, match="official file of teacher=swav_r50 needs teacher_ssl=swav, got moco_v2"):
        build_teacher(TeacherConfig(name="swav_r50"), "moco_v2")
    with pytest.raises(ValueError, match=r"teacher=run needs teacher\.checkpoint=PATH"):
        build_teacher(TeacherConfig(name="run"), "swav")


def test_official_files_are_looked_for_in_the_cache_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEED_CACHE", str(tmp_path))
    torch.save({"state_dict": {"module.encoder_q.conv1.weight": torch.ones(1)}}, tmp_path / "moco_v2_200ep_pretrain.pth.tar")
    with pytest.raises(ValueError, match=r"moco_v2_200ep_pretrain\.pth\.tar does not fit teacher_ssl=moco_v2: missing"):
        build_teacher(TeacherConfig(name="moco_v2_r50"), "moco_v2")
