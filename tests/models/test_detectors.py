"""Detectors see their encoder's own features, train all of it, and freeze what they should."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seed_exp.config.schema import StudentConfig
from seed_exp.models.detectors import DETECTORS, _Trunk, build_detector
from seed_exp.models.students import STUDENTS

FEW = {
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 8,
    "box_batch_size_per_image": 8,
    "min_size": (32, 48),
}


def encoder(network: str = "timm", name: str | None = "test_resnet") -> nn.Module:
    torch.manual_seed(0)
    return STUDENTS[network](StudentConfig(network, name=name)).eval()


def detector(
    name: str, *, masks: bool = False, freeze_bn: bool = False, of: nn.Module | None = None
) -> nn.Module:
    torch.manual_seed(1)
    options: dict[str, Any] = {
        **FEW,
        "max_size": 64,
        "image_mean": [0.5] * 3,
        "image_std": [0.2] * 3,
    }
    return build_detector(name, of or encoder(), 3, masks=masks, freeze_bn=freeze_bn, **options)


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    torch.manual_seed(2)
    images = [torch.rand(3, 40, 48), torch.rand(3, 50, 36)]
    targets = []
    for image in images:
        masks = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        masks[:, 4:30, 6:28] = 1
        targets.append(
            {"boxes": torch.tensor([[6.0, 4, 28, 30]]), "labels": torch.tensor([2]), "masks": masks}
        )
    return images, targets


@torch.no_grad()
@pytest.mark.parametrize("network", ["resnet18", "efficientnet_b0", "mobilenetv3_large"])
def test_the_last_map_is_what_the_students_features_are_made_of(network: str) -> None:
    student = encoder(network, None)
    images = torch.randn(2, 3, 64, 64)
    maps = _Trunk(copy.deepcopy(student), (4, 8, 16, 32)).eval()(images)
    assert [64 // features.shape[2] for features in maps.values()] == [4, 8, 16, 32]
    last = maps["3"]
    if network == "efficientnet_b0":
        last = student.bn2(student.conv_head(last))
    assert torch.allclose(student.forward_head(last), student(images), atol=1e-6)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", DETECTORS)
def test_all_that_can_be_trained_gets_a_gradient(name: str, masks: bool) -> None:
    network = detector(name, masks=masks).train()
    losses = network(*batch())
    expected = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} | (
        {"loss_mask"} if masks else set()
    )
    assert losses.keys() == expected
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    assert [
        key
        for key, value in network.named_parameters()
        if value.requires_grad != (value.grad is not None)
    ] == []
    frozen = [key for key, value in network.named_parameters() if not value.requires_grad]
    assert frozen == []  # a ResNet has no layer behind its last map


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", DETECTORS)
def test_it_finds_objects_in_the_pixels_of_the_image(name: str, masks: bool) -> None:
    images, _ = batch()
    with torch.no_grad():
        outputs = detector(name, masks=masks).eval()(images)
    for image, output in zip(images, outputs, strict=True):
        height, width = image.shape[1:]
        assert len(output["boxes"]) == len(output["labels"]) == len(output["scores"]) > 0
        assert (
            (output["boxes"] >= 0)
            & (output["boxes"] <= torch.tensor([width, height, width, height]))
        ).all()
        assert set(output["labels"].tolist()) <= {1, 2, 3}
        if masks:
            assert output["masks"].shape == (len(output["boxes"]), 1, height, width)


def test_layers_behind_the_last_map_are_not_trained() -> None:
    network = detector("fpn", of=encoder("efficientnet_b0", None))
    frozen = {
        key.split(".")[3] for key, value in network.named_parameters() if not value.requires_grad
    }
    assert frozen == {"conv_head", "bn2"}


def test_frozen_batch_norm_stays_as_the_encoder_has_it() -> None:
    start = encoder()
    for module in start.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = start.forward_intermediates(images, intermediates_only=True)[1:]
        network = detector("fpn", freeze_bn=True, of=copy.deepcopy(start)).train()
        maps = network.backbone.trunk(images)
    for features, value in zip(maps.values(), expected, strict=True):
        assert torch.allclose(features, value, atol=1e-5)
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    free = detector("fpn", of=copy.deepcopy(start)).train()
    with torch.no_grad():
        assert not torch.allclose(free.backbone.trunk(images)["3"], expected[3], atol=1e-2)


@pytest.mark.parametrize(
    ("network", "name", "kind", "message"),
    [
        (
            "convnet_w2",
            None,
            "fpn",
            r"strides 4, 8, 16, 32, ConvNet has none; take a convolutional network of timm",
        ),
        ("timm", "vit_tiny_patch16_224", "fpn", r"VisionTransformer has 16; take a convolutional"),
        (
            "timm",
            "test_efficientnet",
            "c4",
            r"detector=c4 takes a ResNet's last stage .* EfficientNet has none; take fpn",
        ),
    ],
)
def test_encoders_without_such_maps_are_refused(
    network: str, name: str | None, kind: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        detector(kind, of=encoder(network, name))
