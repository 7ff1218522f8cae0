"""Students that SEED released are read as they are.

They serve as the beginning of a student, as students, as teachers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.config.schema import StudentConfig, TeacherConfig
from seed_exp.models.released import RELEASED, is_released, released_tensors
from seed_exp.models.students import STUDENTS, Student, build_student, load_students
from seed_exp.models.teachers import build_teacher

FIXTURES = ["resnet18", "efficientnet_b0", "mobilenetv3_large"]


@pytest.mark.parametrize("network", FIXTURES)
def test_embeddings_are_those_of_the_released_code(
    fill: ModuleType, shared: Path, tmp_path: Path, network: str
) -> None:
    reference = shared / "fixtures" / f"seed_student_{network}.json"
    torch.save(fill.checkpoint(reference), tmp_path / "released.pth.tar")
    expected = json.loads(reference.read_text())["expected_unit_embeddings"]
    config = StudentConfig(network, init=str(tmp_path / "released.pth.tar"))
    started = build_student(config, 128).eval()
    ((loaded, header),) = load_students(tmp_path / "released.pth.tar").values()
    teacher = build_teacher(
        TeacherConfig("run", checkpoint=str(tmp_path / "released.pth.tar")), "swav"
    )
    assert (header["student"]["network"], header["embedding_dim"], header["command"]) == (
        network,
        128,
        "released by SEED",
    )
    for size, embeddings in expected.items():
        with torch.no_grad():
            assert fill.worst_relative_error(started(fill.images(int(size))), embeddings) < 1e-4
    for key, tensor in started.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
        assert torch.equal(teacher.state_dict()[key], tensor), key


# From timm's names to those of the released files, for networks of which there is no fixture.
# Slow and plain: one layer at a time, blocks counted through the stages.

_FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
_OTHERS = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}


def _efficientnet_key(encoder: nn.Module, key: str) -> str:
    match = re.fullmatch(r"blocks\.(\d)\.(\d)\.(.*)\.(\w+)", key)
    if match is None:
        name, parameter = key.split(".")
        released = {
            "conv_stem": "_conv_stem",
            "bn1": "_bn0",
            "conv_head": "_conv_head",
            "bn2": "_bn1",
        }
        return f"{released[name]}.{parameter}"
    stage, number = int(match[1]), int(match[2])
    index = sum(len(blocks) for blocks in encoder.blocks[:stage]) + number
    names = (_FIRST if stage == 0 else _OTHERS) | {
        "se.conv_reduce": "_se_reduce",
        "se.conv_expand": "_se_expand",
    }
    return f"_blocks.{index}.{names[match[3]]}.{match[4]}"


def _mobilenet_key(encoder: nn.Module, key: str) -> str:
    layer, _, parameter = key.rpartition(".")
    outer = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "classifier.0"}
    outer |= {"blocks.6.0.conv": "conv.0", "blocks.6.0.bn1": "conv.1"}
    if layer in outer:
        return f"{outer[layer]}.{parameter}"
    _, stage, number, name = layer.split(".", 3)
    index = 1 + sum(len(blocks) for blocks in encoder.blocks[: int(stage)]) + int(number)
    names = {"conv_dw": "0", "bn1": "1", "conv_pw": "4", "bn2": "5"}
    if stage != "0":
        names = {
            "conv_pw": "0",
            "bn1": "1",
            "conv_dw": "3",
            "bn2": "4",
            "conv_pwl": "7",
            "bn3": "8",
        }
    names |= {"se.conv_reduce": "5.fc.0", "se.conv_expand": "5.fc.2"}
    return f"features.{index}.conv.{names[name]}.{parameter}"


def _as_released(student: Student, network: str) -> dict[str, Any]:
    """The file that SEED would have written of this student."""
    rename = {"efficientnet": _efficientnet_key, "mobilenetv3": _mobilenet_key}.get(
        network.partition("_")[0]
    )
    tensors: dict[str, Tensor] = {
        "module.queue": torch.zeros(4, 2),
        "module.teacher.fc.weight": torch.zeros(3),
    }
    for key, tensor in student.encoder.state_dict().items():
        name = rename(student.encoder, key) if rename else key
        linear = (
            network == "mobilenetv3_large"
            and (".fc." in name or name.startswith("classifier."))
            and tensor.ndim == 4
        )
        tensors[f"module.student.{name}"] = tensor[:, :, 0, 0] if linear else tensor
    tensors |= {
        f"module.student.fc.{key}": tensor for key, tensor in student.head.state_dict().items()
    }
    return {"epoch": 200, "arch": network, "state_dict": tensors}


def _lived(network: str, embedding_dim: int = 6, **options: Any) -> Student:
    """A student whose every tensor differs from a fresh one's."""
    torch.manual_seed(3)
    student = build_student(StudentConfig(network, **options), embedding_dim)
    for tensor in student.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.01 * torch.rand_like(tensor)).add_(0.001 * torch.rand_like(tensor))
        else:
            tensor.add_(7)
    return student.eval()


# Files of FIXTURES are compared with the released code above, where the fixtures are.
@pytest.mark.parametrize(
    "network",
    [pytest.param(name, marks=pytest.mark.slow if name in FIXTURES else ()) for name in RELEASED],
)
def test_every_released_network_computes_what_it_did_after_the_way_there_and_back(
    network: str, tmp_path: Path
) -> None:
    student = _lived(network)
    torch.save(_as_released(student, network), tmp_path / "x.pth.tar")
    started = build_student(StudentConfig(network, init=str(tmp_path / "x.pth.tar")), 6).eval()
    ((loaded, header),) = load_students(tmp_path / "x.pth.tar").values()
    assert header["student"]["network"] == network
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = student(images)
        assert expected.isfinite().all()
        assert torch.equal(started(images), expected)
        assert torch.equal(loaded.eval()(images), expected)


def test_the_released_students_are_ours() -> None:
    assert RELEASED.keys() <= STUDENTS.keys()


def test_a_head_of_other_widths_is_left_random_and_the_encoder_taken(tmp_path: Path) -> None:
    student = _lived("resnet18", hidden_dim=20)
    torch.save(_as_released(student, "resnet18"), tmp_path / "x.pth")
    for embedding_dim, hidden_dim in ((7, 20), (6, None)):
        started = build_student(
            StudentConfig("resnet18", hidden_dim=hidden_dim, init=str(tmp_path / "x.pth")),
            embedding_dim,
        )
        assert started.head[2].out_features == embedding_dim
        for key, tensor in student.encoder.state_dict().items():
            assert torch.equal(started.encoder.state_dict()[key], tensor), key
    fitting = build_student(
        StudentConfig("resnet18", hidden_dim=20, init=str(tmp_path / "x.pth")), 6
    )
    images = torch.randn(1, 3, 64, 64)
    features = student.features(images)
    torch.testing.assert_close(F.normalize(fitting.head(features), dim=1), student(images))
    ((loaded, header),) = load_students(tmp_path / "x.pth").values()
    assert (header["student"]["hidden_dim"], loaded.head[0].out_features) == (20, 20)


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    content = _as_released(_lived("resnet18"), "resnet18")
    path = str(tmp_path / "x.pth")
    torch.save(content, path)
    with pytest.raises(
        ValueError,
        match=r"x\.pth does not fit the encoder resnet34 \(timm's names\): missing layer1\.2",
    ):
        build_student(StudentConfig("resnet34", init=path), 6)
    with pytest.raises(
        ValueError,
        match=r"x\.pth is a student that SEED released, one of resnet18, .*, not convnet_w2",
    ):
        build_student(StudentConfig("convnet_w2", init=path), 6)
    tensors = content["state_dict"]
    torch.save(
        {"state_dict": {key: tensor for key, tensor in tensors.items() if "layer3" not in key}},
        path,
    )
    with pytest.raises(
        ValueError, match=r"x\.pth fits none of the students that SEED released: resnet18, resnet34"
    ):
        load_students(Path(path))
    torch.save(
        {"state_dict": {key: tensor for key, tensor in tensors.items() if ".fc." not in key}}, path
    )
    with pytest.raises(ValueError, match=r"x\.pth holds a student of SEED without its head"):
        load_students(Path(path))
    assert not is_released({"state_dict": {"module.encoder_q.conv1.weight": torch.ones(1)}})
    assert not is_released({"module.student.conv1.weight": torch.ones(1)})


@pytest.mark.parametrize("network", RELEASED)
def test_unknown_names_stay_and_raise_nothing(network: str) -> None:
    names = [
        "_blocks.99._bn1.weight",
        "_blocks.0._odd.weight",
        "features.99.conv.0.weight",
        "features.3.conv.2.weight",
        "x",
        "",
    ]
    given = {"state_dict": {f"module.student.{name}": torch.ones(2) for name in names}}
    assert len(released_tensors(given, network)) == len(names)
