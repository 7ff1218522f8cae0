"""Exported files give the network's own features in timm, torchvision, ONNX Runtime and torch."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from disks import fill
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.config.errors import is_for_user
from seed_exp.config.schema import CropConfig, StudentConfig, ViewsConfig
from seed_exp.exporting import formats, loaders
from seed_exp.exporting.folders import atomic_folder
from seed_exp.exporting.formats import FORMATS, Subject, export_formats, formats_of, hub_config
from seed_exp.exporting.loaders import CHANGES
from seed_exp.exporting.parity import LIMIT, relative_error
from seed_exp.models.maps import feature_maps
from seed_exp.models.students import build_student
from seed_exp.views.recipe import EvalViews

VIT = "test_vit"  # timm's smallest: patches of 16 px
PAPERS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenetv3_large",
    "efficientnet_b0",
    "efficientnet_b1",
]


def views(size: int, resize: int) -> dict[str, Any]:
    return {
        "eval_size": size,
        "eval_resize": resize,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
    }


def subject(
    network: str,
    name: str | None = None,
    *,
    size: int = 64,
    head: bool = False,
    args: dict[str, Any] | None = None,
) -> Subject:
    torch.manual_seed(0)
    config = StudentConfig(network, name, args=args or {})
    student = build_student(config, 16).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    images = F.interpolate(
        torch.randn(5, 3, 7, 7, generator=generator), size=(size, size), mode="bilinear"
    )
    layers = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    # Statistics as after a training: features then differ between images, and rounding stays small.
    for layer in layers:
        layer.train().momentum = None
    student.features(images)
    for layer in layers:
        layer.eval()
    seen = views(size, size + size // 7)
    return Subject(network, student, config, seen, images, head, calibration=lambda: images)


def own_features(given: Subject) -> Tensor:
    with torch.no_grad():
        return given.student.features(given.images)


pytestmark = pytest.mark.usefixtures("exported_files_load_quickly")


def test_a_network_has_the_formats_of_the_libraries_that_equal_it() -> None:
    everything = ["timm", "torchvision", "onnx", "torch_export"]
    assert set(FORMATS) == {*everything, "onnx_fp16", "onnx_int8"}
    assert list(formats_of(subject("resnet18"), None)) == everything
    assert list(formats_of(subject("mobilenetv3_large"), None)) == ["timm", "onnx", "torch_export"]
    assert list(formats_of(subject("convnet_w2"), None)) == ["onnx", "torch_export"]
    assert list(formats_of(subject("resnet18"), ["onnx", "timm"])) == ["onnx", "timm"]


@pytest.mark.parametrize(
    ("network", "names", "head", "message"),
    [
        ("resnet18", ["onxx"], False, "unknown export format 'onxx'; did you mean 'onnx'"),
        ("resnet18", ["torchscript"], False, "unknown export format 'torchscript'"),
        (
            "efficientnet_b1",
            ["torchvision"],
            False,
            "torchvision has no network that equals efficientnet_b1; choose formats from timm,",
        ),
        ("convnet_w2", ["timm"], False, "timm has no network that equals convnet_w2"),
        ("resnet18", ["timm"], True, "head=true needs a format that holds more"),
    ],
)
def test_a_format_that_a_network_does_not_have_is_refused(
    network: str, names: list[str], head: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        formats_of(subject(network, head=head), names)


def test_programs_take_any_number_of_images_and_give_embeddings_when_asked(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    given = subject("convnet_w2", size=32, head=True)
    errors = export_formats(given, formats_of(given, None), tmp_path)
    assert errors.keys() == {"onnx", "torch_export"}
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    program = torch.export.load(tmp_path / "model.pt2").module()
    for num in (1, 2, 5):
        images = given.images[:num]
        with torch.no_grad():
            expected = given.student.features(images), given.student(images)
        for results in (
            session.run(["features", "embeddings"], {"images": images.numpy()}),
            program(images),
        ):
            for result, right in zip(results, expected, strict=True):
                torch.testing.assert_close(torch.as_tensor(result), right, rtol=1e-4, atol=1e-5)


def test_feature_maps_are_those_that_the_features_are_pooled_from(tmp_path: Path) -> None:
    given = replace(subject("convnet_w2", size=32), maps=True)
    export_formats(given, formats_of(given, ["torch_export"]), tmp_path)
    features, maps = torch.export.load(tmp_path / "model.pt2").module()(given.images)
    assert maps.shape == (5, 16, 4, 4)
    torch.testing.assert_close(maps.mean((2, 3)), features)
    with pytest.raises(ValueError, match="maps=true needs a format that holds more"):
        formats_of(replace(subject("resnet18"), maps=True), ["timm"])


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "resnet18"])
def test_maps_are_a_grid_whatever_the_network(name: str) -> None:
    encoder = subject("timm", name).student.encoder
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, maps = feature_maps(encoder, images)
        torch.testing.assert_close(features, encoder(images))
        moved = feature_maps(encoder, images.flip(3))[1]
    assert maps.shape[0] == 2
    assert maps.shape[2] == maps.shape[3] >= 2
    assert not torch.equal(maps, moved)
    if name == "test_vit":
        tokens = encoder.forward_features(images)[:, encoder.num_prefix_tokens :]
        side = maps.shape[3]
        torch.testing.assert_close(maps[1, :, 1, 2], tokens[1, side + 2])


@pytest.mark.parametrize(
    "network", ["mobilenetv3_large", pytest.param("efficientnet_b1", marks=pytest.mark.slow)]
)
def test_weights_load_in_plain_timm_as_written_in_the_lines(network: str, tmp_path: Path) -> None:
    given = subject(network)
    errors = export_formats(given, formats_of(given, ["timm"]), tmp_path)
    assert errors["timm"] <= LIMIT  # another process may use other numbers of threads
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "load.py"}
    (tmp_path / "by_umask").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_changed_network_exported_as_timms_own_is_an_error_with_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = subject("mobilenetv3_large")
    monkeypatch.setattr(loaders, "CHANGES", {})
    expected = (
        r"model.safetensors as timm of .* relative error [\d.e+]+ on 5 images, "
        r"at most 0.0001 is allowed, and float32 itself is"
    )
    with pytest.raises(ValueError, match=expected):
        export_formats(given, formats_of(given, ["timm"]), tmp_path)


def test_timms_own_network_with_a_changed_ones_weights_is_far_off() -> None:
    for network in CHANGES:
        given = subject(network)
        plain = timm.create_model(given.architecture, num_classes=0).eval()
        plain.load_state_dict(given.student.encoder.state_dict())
        with torch.no_grad():
            assert relative_error(plain(given.images), own_features(given)) > 100 * LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args"),
    [("fastvit_t8", {}), (VIT, {"dynamic_img_pad": True, "img_size": 96, "global_pool": "avg"})],
)
def test_networks_of_timm_are_exported_with_their_options_and_without_their_branches(
    name: str, args: dict[str, Any], tmp_path: Path
) -> None:
    given = subject("timm", name, size=72, args=args)
    errors = export_formats(given, formats_of(given, None), tmp_path)
    assert errors.keys() == {"timm", "onnx", "torch_export"}
    own = sum(parameter.numel() for parameter in given.student.encoder.parameters())
    program = torch.export.load(tmp_path / "model.pt2")
    exported = sum(tensor.numel() for tensor in program.state_dict.values())
    assert (exported < own) == (name == "fastvit_t8")
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(given.images), own_features(given), rtol=1e-4, atol=1e-4)


def test_a_network_of_the_users_has_programs_only_even_if_timm_has_one_of_its_name() -> None:
    given = subject("timm", VIT)
    assert formats_of(given, None).keys() == {"timm", "onnx", "torch_export"}
    own = replace(given, config=replace(given.config, network="my_nets:build", name=None))
    assert formats_of(own, None).keys() == {"onnx", "torch_export"}


def test_resnets_load_in_torchvision(tmp_path: Path) -> None:
    given = subject("resnet18")
    formats._write_weights(given, tmp_path)
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(given.images), own_features(given))


@pytest.mark.parametrize(
    ("network", "name"), [("resnet18", None), ("timm", "vit_tiny_patch16_224")]
)
def test_timm_loads_the_folder_by_itself_and_knows_how_images_must_look(
    network: str, name: str | None, tmp_path: Path
) -> None:
    given = subject(network, name, size=96)
    formats._write_weights(given, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(given.images), own_features(given))
    picture = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    picture = np.array(Image.fromarray(picture).resize((200, 150), Image.Resampling.BICUBIC))
    seen = create_transform(**resolve_model_data_config(model), is_training=False)(
        Image.fromarray(picture)
    )
    ours = EvalViews(ViewsConfig("eval", {"global": CropConfig()}, **given.eval_views))
    batch = ours.empty(1)
    ours.host([torch.from_numpy(picture).permute(2, 0, 1)], np.array([-1]), 0, np.array([0]), batch)
    grey_level = 1 / 255 / 0.2
    torch.testing.assert_close(
        seen, ours.device(batch)["global"][0, 0], atol=1.5 * grey_level, rtol=0
    )


def test_timm_resizes_to_exactly_the_size_that_was_evaluated() -> None:
    given = subject("resnet18")
    for size, resize in [(9, 14), (14, 25), (224, 256), (32, 32), (96, 110), (518, 592)]:
        given.eval_views.update(views(size, resize))
        assert math.floor(size / hub_config(given)["pretrained_cfg"]["crop_pct"]) == resize


def test_config_json_is_not_written_where_it_would_load_another_network(tmp_path: Path) -> None:
    formats._write_weights(subject("mobilenetv3_large"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "name"),
    [
        *((paper, None) for paper in PAPERS),
        ("timm", "vit_tiny_patch16_224"),
        ("timm", "convnext_atto"),
    ],
)
def test_every_format_of_every_network_agrees_to_1e_4(
    network: str, name: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    given = subject(network, name, size=224, head=True)
    errors = export_formats(given, formats_of(given, None), tmp_path)
    assert set(errors) >= {"timm", "onnx", "torch_export"}
    assert max(errors.values()) <= LIMIT
    written = tmp_path / "config.json"
    assert (
        not written.exists()
        or json.loads(written.read_text())["num_features"] == given.student.num_features
    )


@pytest.mark.parametrize(
    "name", ["timm", "torch_export", pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_a_full_disk_is_named_whatever_library_writes(name: str, small_disk: Path) -> None:
    given = subject("timm", "test_vit") if name == "timm" else subject("convnet_w2", size=16)
    ballast = fill(small_disk, leave=1 << 13)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*disk/\.?out") as raised,
        atomic_folder(small_disk / "out") as folder,
    ):
        FORMATS[name].write(given, folder)
    assert is_for_user(raised.value)
    assert list(small_disk.iterdir()) == [ballast]
