"""Students of timm: the ones that have a name of ours, options of the architecture, weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from seed_exp.config.compose import compose
from seed_exp.config.schema import CropConfig, StudentConfig, ViewsConfig
from seed_exp.models import encoders
from seed_exp.models.folding import has_branches, reparameterised
from seed_exp.models.students import build_student, load_students, save_student
from seed_exp.models.weights import tensors_hash
from seed_exp.training.encoders import check_view_sizes, student_inputs

CONF = Path(__file__).parents[2] / "conf"
PRESETS = {
    "vit_tiny": 192,
    "vit_small": 384,
    "mobilenetv4_small": 1280,
    "convnext_atto": 320,
    "efficientvit_b0": 1280,
    "fastvit_t8": 768,
    "resnet10t": 512,
}
VIT = "test_vit"  # timm's smallest: patches of 16 px, width 64


def views(*sizes: int) -> ViewsConfig:
    crops = {name: CropConfig(size) for name, size in zip(("global", "local"), sizes, strict=False)}
    return ViewsConfig("x", crops, eval_size=sizes[0], eval_resize=sizes[0])


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_trains_on_small_views_that_no_patch_divides(name: str) -> None:
    config = compose("distill", ["data.root=/x", f"student={name}"]).students[name]
    student = build_student(config, 8)
    check_view_sizes({name: student}, views(72, 40))
    embeddings = student.train()(torch.randn(2, 3, 40, 40))
    assert (student.num_features, embeddings.shape) == (PRESETS[name], (2, 8))
    embeddings.sum().backward()
    idle = [key for key, weight in student.named_parameters() if weight.grad is None]
    assert idle == []
    num = sum(parameter.numel() for parameter in student.encoder.parameters())
    text = (CONF / "student" / f"{name}.yaml").read_text()
    assert f" {num / 1e6:.1f} M parameters, feature {PRESETS[name]}." in text


def test_padding_is_what_zeros_around_the_view_do_and_nothing_where_patches_fit() -> None:
    torch.manual_seed(0)
    padded = build_student(StudentConfig("timm", VIT, args={"dynamic_img_pad": True}), 8).eval()
    plain = build_student(StudentConfig("timm", VIT), 8).eval()
    plain.load_state_dict(padded.state_dict())
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        zeros = nn.functional.pad(images, (0, 8, 0, 8))
        torch.testing.assert_close(padded(images), plain(zeros))
        assert torch.equal(padded(zeros), plain(zeros))


def test_views_that_patches_do_not_divide_are_an_error_with_both_ways_out() -> None:
    student = build_student(StudentConfig("timm", VIT), 8)
    expected = (
        r"student v does not take views of 40 x 40 pixels: .*; its patches have 16 px: choose "
        r"sizes that 16 divides, or students\.v\.args={dynamic_img_pad: true}, which pads"
    )
    with pytest.raises(ValueError, match=expected):
        check_view_sizes({"v": student}, views(64, 40))


def test_args_reach_timm_and_come_back_with_the_file(tmp_path: Path) -> None:
    args = {"img_size": 64, "drop_path_rate": 0.3, "global_pool": "avg"}
    config = StudentConfig("timm", VIT, args=args)
    student = build_student(config, 8).eval()
    assert student.encoder.pos_embed.shape[1] == 1 + 4**2
    assert student.encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    save_student(tmp_path / "v.safetensors", student, config, {})
    loaded, header = load_students(tmp_path / "v.safetensors")["v"]
    assert header["student"]["args"] == args
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.eval()(images), student(images))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depht": 3}, r"timm's test_vit does not take all of {'depht': 3} .*leave out what"),
        ({"checkpoint_path": "x.pth"}, "args.checkpoint_path=x.pth is not for you to set"),
        ({"pretrained_cfg": {"file": "x"}}, "args.pretrained_cfg=.* is not for you to set"),
        ({"num_classes": 3}, "args.num_classes=3 is not for you to set"),
        # timm ignores options without a value, and the names become part of a line of Python.
        ({"x=None); exit(": None}, r"args has 'x=None\); exit\(', which is no name of an option"),
        ({"class": None}, "args has 'class', which is no name of an option"),
        ({"norm_layer": {"x": 1}}, "must be a number, text, true, false, null, or a list of these"),
    ],
)
def test_args_that_are_unknown_or_not_of_the_architecture_are_refused(
    args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_student(StudentConfig("timm", VIT, args=args), 8)


def test_args_and_weights_of_timm_are_for_its_networks_only() -> None:
    with pytest.raises(ValueError, match="is for network=timm and for student=custom"):
        StudentConfig("resnet18", args={"drop_path_rate": 0.1})
    with pytest.raises(ValueError, match=r"this network is resnet18: give a file, students.<name>"):
        StudentConfig("resnet18", pretrained=True)
    with pytest.raises(ValueError, match="two sets of initial weights"):
        StudentConfig("timm", VIT, pretrained=True, init="x.pth")


def test_an_output_that_args_leave_unpooled_is_refused_before_training() -> None:
    student = build_student(StudentConfig("timm", VIT, args={"global_pool": ""}), 8)
    with pytest.raises(ValueError, match=r"student v returns, .* \[1, 17, 64\]; expected features"):
        check_view_sizes({"v": student}, views(64))


@pytest.fixture
def timms_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file from which timm takes its weights, in place of the hub."""
    torch.manual_seed(11)
    model = timm.create_model(VIT)
    file = tmp_path / "timm.safetensors"
    save_file(model.state_dict(), file)
    create = timm.create_model

    def local(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        overlay = {"file": str(file)} if pretrained else None
        return create(name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)

    monkeypatch.setattr(encoders.timm, "create_model", local)
    return file


def test_a_student_starts_from_timms_weights_which_are_an_input(
    tmp_path: Path, timms_weights: Path
) -> None:
    config = StudentConfig("timm", VIT, pretrained=True)
    student = build_student(config, 8)
    reference = timm.create_model(VIT, pretrained=True, num_classes=0)
    for key, tensor in reference.state_dict().items():
        assert torch.equal(student.encoder.state_dict()[key], tensor), key
    inputs = student_inputs({"v": config}, {"v": student})
    assert inputs == {"students.v.pretrained": tensors_hash(reference.state_dict())}
    assert build_student(StudentConfig("timm", VIT), 8).fingerprints == {}
    save_student(tmp_path / "v.safetensors", student, config, {})
    timms_weights.unlink()  # a trained student needs them no more
    loaded, _ = load_students(tmp_path / "v.safetensors")["v"]
    assert torch.equal(loaded.head[0].weight, student.head[0].weight)
    with pytest.raises(ValueError, match="timm cannot load test_vit"):
        build_student(config, 8)


def test_fastvits_branches_become_one_layer_each_and_compute_the_same() -> None:
    torch.manual_seed(0)
    network = timm.create_model("fastvit_t8", num_classes=0)
    images = torch.randn(2, 3, 64, 64)
    network(images)  # moves the statistics of batch norm
    network.eval()
    fused = reparameterised(network)
    assert sum(1 for _ in fused.modules()) < 0.6 * sum(1 for _ in network.modules())
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(fused(images), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(network(images), expected)
    plain = timm.create_model("resnet10t", num_classes=0)
    assert has_branches(network)
    assert reparameterised(plain) is plain
