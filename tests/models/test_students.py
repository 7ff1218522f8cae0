"""Students are the released networks, under timm's names, and survive being saved and loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from torch import nn

from seed_exp.base.files import file_hash
from seed_exp.config.schema import CropConfig, StudentConfig, TeacherConfig, ViewsConfig
from seed_exp.exporting.loaders import CHANGES
from seed_exp.models import students
from seed_exp.models.student_header import read_header
from seed_exp.models.students import (
    NEAR_TWINS,
    STUDENTS,
    Student,
    build_student,
    load_students,
    save_student,
)
from seed_exp.models.teachers import build_teacher
from seed_exp.models.weights import read_checkpoint

CONF = Path(__file__).parents[2] / "conf"
TIMM_NAMES = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "mobilenetv3_large": "mobilenetv3_large_100",
    "efficientnet_b0": "tf_efficientnet_b0",
    "efficientnet_b1": "tf_efficientnet_b1",
}


def _config(network: str, **options: object) -> StudentConfig:
    return StudentConfig(network=network, name="vgg11" if network == "timm" else None, **options)  # type: ignore[arg-type]


def test_each_network_that_is_nearly_timms_has_its_loader() -> None:
    assert NEAR_TWINS.keys() == CHANGES.keys()
    assert NEAR_TWINS.items() <= TIMM_NAMES.items()


def test_every_student_has_an_option_file_and_the_other_way_round() -> None:
    files = {path.stem: path.read_text() for path in (CONF / "student").glob("*.yaml")}
    of_timm = {name for name, text in files.items() if "\nnetwork: timm\nname: " in text}
    assert files.keys() - of_timm - {"custom"} == set(STUDENTS)
    for name, text in files.items():
        assert text.startswith(f"# @package students.{name}\n")
        network = "timm" if name in of_timm else "???" if name == "custom" else name
        assert f"\nnetwork: {network}\n" in text


@pytest.mark.parametrize("network", TIMM_NAMES)
def test_keys_and_shapes_are_those_of_timm(network: str) -> None:
    ours = STUDENTS[network](_config(network)).state_dict()
    reference = timm.create_model(TIMM_NAMES[network], num_classes=0).state_dict()
    assert [(key, tensor.shape) for key, tensor in ours.items()] == [
        (key, tensor.shape) for key, tensor in reference.items()
    ]


@pytest.mark.parametrize("network", [*TIMM_NAMES, "convnet_w2", "convnet_w32"])
def test_embeddings_are_unit_vectors_of_features(network: str) -> None:
    student = build_student(_config(network), embedding_dim=7)
    images = torch.randn(2, 3, 64, 64)
    assert student.features(images).shape == (2, student.num_features)
    embeddings = student(images)
    assert embeddings.shape == (2, 7)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student(images).dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["vgg11", "mobilenetv4_conv_small", "deit_tiny_patch16_224.fb_in1k", "regnetx_002"]
)
def test_any_network_of_timm_says_the_width_of_its_pooled_output(name: str) -> None:
    student = build_student(StudentConfig(network="timm", name=name), 128)
    assert student.eval().features(torch.randn(1, 3, 224, 224)).shape == (1, student.num_features)


@pytest.mark.parametrize("network", ["efficientnet_b0", "efficientnet_b1"])
def test_efficientnets_train_as_released(network: str) -> None:
    encoder = STUDENTS[network](_config(network))
    assert {
        module.momentum for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)
    } == {0.01}
    assert encoder.drop_rate == 0.2
    assert max(
        module.drop_prob for module in encoder.modules() if isinstance(module, DropPath)
    ) == pytest.approx(0.2, abs=0.02)
    images = torch.randn(2, 3, 64, 64)
    assert not torch.equal(encoder.train()(images), encoder(images))
    assert (encoder(images) == 0).float().mean() > 0.1  # dropout reaches the feature
    assert torch.equal(encoder.eval()(images), encoder(images))


@pytest.mark.parametrize("network", ["efficientnet_b1", "mobilenetv3_large"])
def test_the_released_networks_differ_from_timm_in_their_output(network: str) -> None:
    torch.manual_seed(0)
    reference = timm.create_model(TIMM_NAMES[network], num_classes=0).eval()
    ours = STUDENTS[network](_config(network)).eval()
    ours.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 96, 96)
    assert (ours(images) - reference(images)).abs().max() > 1e-4 * reference(images).abs().max()


def test_efficientnet_b1_has_the_paddings_for_240_px() -> None:
    torch.manual_seed(0)
    reference = timm.create_model("tf_efficientnet_b1", num_classes=0).eval()
    ours = STUDENTS["efficientnet_b1"](_config("efficientnet_b1")).eval()
    ours.load_state_dict(reference.state_dict())
    with torch.no_grad():
        images = torch.randn(1, 3, 240, 240)
        torch.testing.assert_close(ours(images), reference(images))
        assert ours.forward_features(images).shape == reference.forward_features(images).shape


def test_the_activation_is_moved_in_every_block_with_squeeze_excite() -> None:
    encoder = STUDENTS["mobilenetv3_large"](_config("mobilenetv3_large"))
    blocks = [block for stage in encoder.blocks for block in stage if hasattr(block, "conv_pwl")]
    moved = [block for block in blocks if "se.conv_reduce.weight" in block.state_dict()]
    assert len(moved) == 8
    assert all(isinstance(block.bn2.act, nn.Identity) for block in moved)
    assert not any(isinstance(block.bn2.act, nn.Identity) for block in blocks if block not in moved)


def _trained(network: str = "convnet_w2", **options: object) -> tuple[Student, StudentConfig]:
    """A student whose BN statistics have moved."""
    config = _config(network, **options)
    student = build_student(config, 8)
    student(torch.randn(4, 3, 32, 32))
    return student.eval(), config


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_saved_student_comes_back_with_its_metadata(tmp_path: Path) -> None:
    student, config = _trained(hidden_dim=33)
    save_student(
        tmp_path / "students" / "small.safetensors",
        student,
        config,
        {"step": 7, "teacher": "swav_r50"},
    )
    for place in (tmp_path, tmp_path / "students" / "small.safetensors"):
        loaded, header = load_students(place)["small"]
        assert _same(student, loaded)
        assert (header["step"], header["teacher"], header["embedding_dim"]) == (7, "swav_r50", 8)
        assert StudentConfig(**header["student"]) == config
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(student(images), loaded.eval()(images))


def test_students_of_a_run_are_chosen_by_name(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save_student(tmp_path / "students" / f"{name}.safetensors", *_trained(), {"name": name})
    assert list(load_students(tmp_path)) == ["a", "b", "c"]
    assert [header["name"] for _, header in load_students(tmp_path, ["c", "a"]).values()] == [
        "c",
        "a",
    ]
    with pytest.raises(ValueError, match=r"unknown student of .* 'd'.*Known: a, b, c"):
        load_students(tmp_path, ["d"])


def test_what_is_no_run_and_no_student_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run folder or student file"):
        load_students(tmp_path / "absent")
    with pytest.raises(
        ValueError, match=r"holds no students; expected .*/students/<name>\.safetensors"
    ):
        load_students(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is no student file"):
        load_students(tmp_path / "x.safetensors")
    student, _ = _trained()
    save_student(tmp_path / "y.safetensors", student, _config("convnet_w32"), {})
    with pytest.raises(
        ValueError,
        match=r"y\.safetensors does not fit its own network convnet_w32: encoder.* is \[",
    ):
        load_students(tmp_path / "y.safetensors")


_VIEWS = {"eval_size": 8, "eval_resize": 9, "mean": [0, 0, 0], "std": [1, 1, 1]}


def test_views_in_a_header_are_completed_with_their_defaults(tmp_path: Path) -> None:
    path, usual = tmp_path / "x.safetensors", ViewsConfig("", {"global": CropConfig()})
    save_student(path, *_trained(), {"eval_views": _VIEWS})
    assert (read_header(path) or {})["eval_views"] == _VIEWS
    save_student(path, *_trained(), {"eval_views": {"eval_size": 8}})
    found = (read_header(path) or {})["eval_views"]
    assert found == {**_VIEWS, "eval_resize": usual.eval_resize} | {
        "mean": list(usual.mean),
        "std": list(usual.std),
    }


@pytest.mark.parametrize(
    "views",
    [
        *([1], "x", {**_VIEWS, "](http://x)": 1}, {**_VIEWS, "mean": ["<script>"] * 3}),
        *({**_VIEWS, "eval_size": "8; x"}, {**_VIEWS, "eval_size": 8.5}, {**_VIEWS, "std": 1}),
    ],
)
def test_a_header_with_views_that_are_none_is_refused(views: Any, tmp_path: Path) -> None:
    save_student(tmp_path / "x.safetensors", *_trained(), {"eval_views": views})
    with pytest.raises(ValueError, match=r"x\.safetensors has a header that describes no student"):
        load_students(tmp_path / "x.safetensors")


def test_init_takes_the_encoder_of_a_run(tmp_path: Path) -> None:
    student, config = _trained()
    save_student(tmp_path / "students" / "small.safetensors", student, config, {})
    save_student(tmp_path / "students" / "large.safetensors", *_trained("convnet_w32"), {})
    for place in (tmp_path, tmp_path / "students" / "small.safetensors"):
        started = build_student(_config("convnet_w2", init=str(place)), 5)
        assert _same(started.encoder, student.encoder)
        assert started.embedding_dim == 5
    with pytest.raises(
        ValueError,
        match=r"holds 0 students with network resnet18 \(large, small in all\); "
        r"give a student's file",
    ):
        build_student(_config("resnet18", init=str(tmp_path)), 5)


@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_init_takes_a_state_dict_in_the_names_of_timm(
    tmp_path: Path, container: str | None
) -> None:
    reference = timm.create_model("resnet18", num_classes=10)
    tensors = reference.state_dict()
    torch.save(
        tensors if container is None else {"epoch": 1, container: tensors}, tmp_path / "x.pth.tar"
    )
    encoder = build_student(_config("resnet18", init=str(tmp_path / "x.pth.tar")), 128).encoder
    reference.reset_classifier(0)
    assert _same(encoder, reference)


def test_init_refuses_what_does_not_fit(tmp_path: Path) -> None:
    encoder = STUDENTS["convnet_w2"](_config("convnet_w2"))
    tensors = encoder.state_dict()
    path = str(tmp_path / "x.safetensors")
    save_file({**tensors, "fc.weight": torch.ones(1), "more": torch.ones(1)}, path)
    with pytest.raises(
        ValueError,
        match=r"does not fit the encoder convnet_w2 \(timm's names\): unexpected fc.weight, more",
    ):
        build_student(_config("convnet_w2", init=path), 128)
    save_file({key: tensor for key, tensor in tensors.items() if key != "layers.0.weight"}, path)
    with pytest.raises(ValueError, match=r"missing layers\.0\.weight"):
        build_student(_config("convnet_w2", init=path), 128)
    with pytest.raises(ValueError, match="expected"):
        build_student(_config("convnet_w32", init=path), 128)
    with pytest.raises(FileNotFoundError, match="no checkpoint file"):
        build_student(_config("convnet_w2", init=str(tmp_path / "absent.pth")), 128)


TWINS = list(NEAR_TWINS.items())


@pytest.mark.parametrize(("network", "of_timm"), TWINS)
def test_init_refuses_weights_of_a_network_that_is_nearly_the_same(
    tmp_path: Path, network: str, of_timm: str
) -> None:
    own, others = StudentConfig(network), StudentConfig("timm", of_timm)
    for config in (own, others):
        save_student(
            tmp_path / f"{config.network}.safetensors", build_student(config, 8), config, {}
        )
    save_file(build_student(others, 8).encoder.state_dict(), tmp_path / "plain.safetensors")
    save_file(
        build_student(own, 8).encoder.state_dict(),
        tmp_path / "exported.safetensors",
        {"network": network},
    )
    for config, file in ((own, "timm"), (own, "plain"), (others, network), (others, "exported")):
        with pytest.raises(
            ValueError,
            match=rf"timm's {of_timm} and SEED's {network} have tensors of the same names",
        ):
            build_student(replace(config, init=str(tmp_path / f"{file}.safetensors")), 8)
    for config, file in ((own, network), (own, "exported"), (others, "timm"), (others, "plain")):
        build_student(replace(config, init=str(tmp_path / f"{file}.safetensors")), 8)
    with pytest.raises(ValueError, match=f"holds weights of {network}, not of timm"):
        build_teacher(
            TeacherConfig("timm", of_timm, checkpoint=str(tmp_path / "exported.safetensors")),
            "swav",
        )


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.safetensors"
    save_student(path, *_trained(), {"step": 1})
    later, config = _trained()

    def read(path: Path) -> dict[str, Any]:
        tensors = read_checkpoint(path)
        monkeypatch.undo()
        save_student(path, later, config, {"step": 2})  # between the tensors and the header
        return tensors

    monkeypatch.setattr(students, "read_checkpoint", read)
    loaded, header = load_students(path)["small"]
    assert _same(loaded, later)
    assert (header["step"], header["sha256"]) == (2, file_hash(path))


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    student, config = _trained()
    student.encoder.register_parameter("again", next(student.encoder.parameters()))
    save_student(tmp_path / "tied.safetensors", student, config, {})
    tensors = load_file(tmp_path / "tied.safetensors")
    assert torch.equal(tensors["encoder.again"], next(student.encoder.parameters()))


def test_unknown_networks_name_the_closest() -> None:
    with pytest.raises(
        ValueError, match="unknown student network 'resnet19'; did you mean 'resnet18'"
    ):
        build_student(StudentConfig(network="resnet19"), 128)
    with pytest.raises(ValueError, match="timm has no network 'resnet262'; did you mean 'resnet26"):
        build_student(StudentConfig(network="timm", name="resnet262"), 128)
    with pytest.raises(
        ValueError, match=r"timm has no network 'qqqq'; timm\.list_models\(\) names"
    ):
        build_student(StudentConfig(network="timm", name="qqqq"), 128)
    with pytest.raises(
        ValueError, match=r"timm cannot load resnet18\.bogus \(Invalid pretrained tag"
    ):
        build_student(StudentConfig(network="timm", name="resnet18.bogus"), 128)
    with pytest.raises(
        ValueError, match=r"needs the network's name in timm, e\.g\. student=timm/resnet26"
    ):
        build_student(StudentConfig(network="timm"), 128)
    with pytest.raises(ValueError, match="only for network=timm; this network is resnet18"):
        build_student(StudentConfig(network="resnet18", name="resnet50"), 128)


def test_a_run_of_before_whose_student_of_timm_is_called_timm_still_loads(tmp_path: Path) -> None:
    config = StudentConfig("timm", "test_vit")
    student = build_student(config, 16)
    save_student(
        tmp_path / "students" / "timm.safetensors", student, config, {"command": "distill"}
    )
    ((name, (loaded, header)),) = load_students(tmp_path).items()
    assert (name, header["student"]["name"]) == ("timm", "test_vit")
    for key, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
