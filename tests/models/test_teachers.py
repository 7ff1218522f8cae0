"""Teachers are frozen, and come from official files or our own runs.

A combination that cannot work is refused before a download.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from seed_exp.base.files import file_hash
from seed_exp.config.schema import Reduce, StudentConfig, TeacherConfig, TeacherEmbedding
from seed_exp.models import teachers
from seed_exp.models.convnet import ConvNet
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.heads import head_layers, projection_head
from seed_exp.models.students import build_student, save_student
from seed_exp.models.teacher_ssl import TEACHER_SSL
from seed_exp.models.teachers import NETWORKS, TEACHERS, build_teacher, untrained_teacher

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(
    ("group", "registry"), [("teacher", TEACHERS), ("teacher_ssl", TEACHER_SSL)]
)
def test_option_files_and_registry_are_the_same_set(
    group: str, registry: dict[str, object]
) -> None:
    named = {path.stem for path in (CONF / group).glob("*.yaml")} - {"custom"}
    assert named == set(registry)


def test_option_files_say_what_the_registry_says() -> None:
    for name, spec in TEACHERS.items():
        text = (CONF / "teacher" / f"{name}.yaml").read_text()
        assert re.findall(r"^network: (.*)$", text, re.MULTILINE) == [name]
        assert re.findall(
            r"^  - override /teacher_ssl@_global_\.teacher_ssl: (.*)$", text, re.MULTILINE
        ) == ([spec.teacher_ssl] if spec.teacher_ssl else [])
        if spec.network:
            assert f", {spec.epochs or 'unknown'} epochs" in text
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


def test_embeddings_of_a_teacher_are_constants_that_a_loss_may_keep() -> None:
    embeddings = _teacher()(torch.randn(3, 3, 32, 32))
    assert not embeddings.is_inference()
    student = torch.randn(3, 4, requires_grad=True)
    (student * embeddings).sum().backward()
    assert torch.equal(student.grad, embeddings)


def test_folding_changes_neither_embeddings_nor_what_a_teacher_is_called() -> None:
    teacher = _teacher()
    teacher.fingerprint = "md5:0"
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(8, 3, 32, 32)
    before = teacher(images)
    teacher.fold_batch_norm()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in teacher.modules())
    torch.testing.assert_close(teacher(images), before)
    assert teacher.fingerprint == "md5:0"
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


EVAL_VIEWS = {"eval_size": 32, "eval_resize": 32, "mean": [0.1] * 3, "std": [0.2] * 3}


def test_features_are_the_pooled_encoder_output_at_unit_length() -> None:
    teacher, images = _teacher(), torch.randn(3, 3, 16, 16)
    pooled = teacher.encoder(images)
    torch.testing.assert_close(teacher.features(images), pooled)
    teacher.drop_head()
    assert teacher.embedding_dim == pooled.shape[1] == 16
    torch.testing.assert_close(teacher(images), torch.nn.functional.normalize(pooled, dim=1))


@pytest.mark.parametrize(("reduce", "width"), [(None, 2048), (Reduce.pca, 128)])
def test_a_teachers_features_can_be_the_embedding(reduce: Reduce | None, width: int) -> None:
    config = TeacherConfig("moco_v2_r50", embedding=TeacherEmbedding.features, reduce=reduce)
    with torch.device("meta"):
        assert untrained_teacher(config, "moco_v2").embedding_dim == width


def test_a_teacher_by_batch_needs_batch_norm_and_never_moves() -> None:
    with pytest.raises(ValueError, match="teacher_statistics=batch is for teachers with batch"):
        Teacher(torch.nn.Flatten(), torch.nn.Linear(12, 4), 4).normalise_by_batch()
    teacher, images = _teacher(), torch.randn(6, 3, 16, 16)
    alone = teacher(images[:3])
    assert torch.equal(teacher(images)[:3], alone)
    teacher.normalise_by_batch()
    first = teacher.train()(images)
    assert not torch.allclose(first[:3], teacher(images[:3]), atol=1e-3)
    assert torch.equal(first, teacher(images))


def test_a_network_of_our_own_run_is_a_teacher(tmp_path: Path) -> None:
    config = StudentConfig(network="convnet_w2")
    student = build_student(config, 8)
    student(torch.randn(4, 3, 32, 32))
    save_student(
        tmp_path / "students" / "a.safetensors", student.eval(), config, {"eval_views": EVAL_VIEWS}
    )
    images = torch.randn(2, 3, 32, 32)
    for place in (tmp_path, tmp_path / "students" / "a.safetensors"):
        teacher = build_teacher(TeacherConfig("run", checkpoint=str(place)), "swav")
        assert teacher.embedding_dim == 8
        assert (teacher.inputs.spec.mean, teacher.inputs.spec.std) == ([0.1] * 3, [0.2] * 3)
        assert teacher.fingerprint == file_hash(tmp_path / "students" / "a.safetensors")
        assert not any(module.training for module in teacher.modules())
        assert torch.equal(teacher(images), student(images))
    save_student(
        tmp_path / "students" / "b.safetensors",
        build_student(config, 9),
        config,
        {"eval_views": EVAL_VIEWS},
    )
    with pytest.raises(
        ValueError, match=r"holds several networks; choose one with teacher\.student=a\|b"
    ):
        build_teacher(TeacherConfig("run", checkpoint=str(tmp_path)), "swav")
    assert (
        build_teacher(
            TeacherConfig("run", checkpoint=str(tmp_path), student="b"), "swav"
        ).embedding_dim
        == 9
    )
    with pytest.raises(ValueError, match=r"'c'.*Known: a, b"):
        build_teacher(TeacherConfig("run", checkpoint=str(tmp_path), student="c"), "swav")


@pytest.mark.parametrize(
    ("reference", "name", "teacher_ssl"),
    [
        ("moco_v1_resnet50", "moco_v1_r50", "moco_v1"),
        ("moco_v2_resnet50", "moco_v2_r50", "moco_v2"),
        ("simclr_resnet50", "simclr_r50", "simclr"),
        ("swav_resnet50", "swav_r50", "swav"),
        ("swav_resnet50w2", "swav_r50w2", "swav"),
    ],
)
def test_an_untrained_teacher_has_the_tensors_of_the_published_file(
    shared: Path, reference: str, name: str, teacher_ssl: str
) -> None:
    convention = TEACHER_SSL[teacher_ssl]
    keys = json.loads((shared / "fixtures" / f"{reference}.json").read_text())["keys"]
    expected = {
        key: shape
        for key, shape, _ in keys
        if not key.removeprefix("module.").startswith(convention.ignored)
    }
    with torch.device("meta"):
        teacher = untrained_teacher(TeacherConfig(name), teacher_ssl)
    prefix = {"simclr": "module.module.module."}.get(teacher_ssl, "module.") + convention.prefix
    given = {
        prefix + key: list(tensor.shape) for key, tensor in teacher.encoder.state_dict().items()
    }
    given |= {
        f"{prefix}{convention.head}.{key}": list(tensor.shape)
        for key, tensor in teacher.head.state_dict().items()
    }
    assert given == expected
    assert teacher.embedding_dim == 128


def test_every_teacher_can_be_built_untrained() -> None:
    with torch.device("meta"):
        heads = {
            name: head_layers(untrained_teacher(TeacherConfig(name), spec.teacher_ssl).head)
            for name, spec in TEACHERS.items()
            if spec.teacher_ssl
        }
    assert heads.pop("swav_r50w5") == "Linear-ReLU-Linear"
    assert heads == {name: TEACHER_SSL[TEACHERS[name].teacher_ssl or ""].heads[0] for name in heads}
    with pytest.raises(ValueError, match=r"teacher=run needs teacher\.checkpoint=PATH"):
        untrained_teacher(TeacherConfig("run"), "swav")


def test_what_cannot_work_is_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teachers, "download", None)
    with pytest.raises(ValueError, match="unknown teacher 'swav_r51'; did you mean 'swav_r50'"):
        build_teacher(TeacherConfig("swav_r51"), "swav")
    with pytest.raises(
        ValueError, match=r"simclr_r50 has no lasting address.*teacher\.checkpoint=PATH"
    ):
        build_teacher(TeacherConfig("simclr_r50"), "simclr")
    with pytest.raises(
        ValueError, match="official file of teacher=swav_r50 needs teacher_ssl=swav, got moco_v2"
    ):
        build_teacher(TeacherConfig("swav_r50"), "moco_v2")
    with pytest.raises(ValueError, match=r"teacher=run needs teacher\.checkpoint=PATH"):
        build_teacher(TeacherConfig("run"), "swav")


def test_official_files_are_looked_for_in_the_cache_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEED_CACHE", str(tmp_path))
    torch.save(
        {"state_dict": {"module.encoder_q.conv1.weight": torch.ones(1)}},
        tmp_path / "moco_v2_200ep_pretrain.pth.tar",
    )
    with pytest.raises(
        ValueError,
        match=r"moco_v2_200ep_pretrain\.pth\.tar does not fit teacher_ssl=moco_v2: missing",
    ):
        build_teacher(TeacherConfig("moco_v2_r50"), "moco_v2")
