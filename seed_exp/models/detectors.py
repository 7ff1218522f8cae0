"""Detectors of torchvision on students' encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from seed_exp.base.registry import lookup

_PYRAMID_STRIDES = (4, 8, 16, 32)
_PYRAMID_WIDTH = 256
_MASK_WIDTH = 256


def build_detector(
    name: str,
    encoder: nn.Module,
    num_classes: int,
    *,
    masks: bool,
    freeze_bn: bool,
    **transform: Any,
) -> nn.Module:
    """Faster R-CNN, or Mask R-CNN if `masks`, that takes over `encoder` with its weights.

    In training mode it maps a list of images (float32 [3, H, W], values from 0 to 1) and a list of
    targets (boxes [n, 4], labels [n] from 1, masks [n, H, W]) to losses by name. In evaluation mode
    it maps images to boxes, labels, scores and masks in the pixels of each image.

    Args:
        name: Key of DETECTORS.
        encoder: Network of timm; all of it is trained, except layers that detection does not use.
        num_classes: Number of classes without the background.
        masks: Whether objects are segmented.
        freeze_bn: Whether the encoder's batch norm stays fixed; the detector then adds no batch
            norm of its own.
        transform: Options of torchvision's detectors: min_size, max_size, image_mean, image_std.

    Raises:
        ValueError: the encoder has no feature maps of the required strides.
    """
    encoder.requires_grad_(True)
    if freeze_bn:
        encoder = freeze_batch_norm_2d(encoder)  # type: ignore[no-untyped-call]
    norm = None if freeze_bn else nn.BatchNorm2d
    return lookup(DETECTORS, name, "detector")(encoder, num_classes + 1, masks, norm, transform)


class _Trunk(nn.Module):
    """Feature maps of an encoder under the names "0", "1", ..., finest first.

    Args:
        encoder: Network of timm that has maps of these strides.
        strides: Strides of the maps: pixels of the image per value of the map.
    """

    def __init__(self, encoder: nn.Module, strides: Sequence[int]) -> None:
        super().__init__()
        maps: list[dict[str, Any]] = list(getattr(encoder, "feature_info", []))
        levels = {level["reduction"]: number for number, level in enumerate(maps)}
        if not hasattr(encoder, "forward_intermediates") or not set(strides) <= levels.keys():
            raise ValueError(
                f"detection needs feature maps of strides {', '.join(map(str, strides))}, "
                f"{type(encoder).__name__} has {', '.join(map(str, sorted(levels))) or 'none'}; "
                "take a convolutional network of timm, such as ResNets, EfficientNets and "
                "MobileNets"
            )
        self.encoder, self.levels = encoder, [levels[stride] for stride in strides]
        self.widths: list[int] = [maps[level]["num_chs"] for level in self.levels]
        self._freeze_unused()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.encoder.forward_intermediates(
            images, indices=self.levels, intermediates_only=True
        )  # type: ignore[operator]
        return {str(number): features for number, features in enumerate(maps)}

    @torch.enable_grad()
    def _freeze_unused(self) -> None:
        """Freezes the parameters behind the last map, for whose gradients DDP would wait."""
        parameters = [
            parameter for parameter in self.encoder.parameters() if parameter.requires_grad
        ]
        self.encoder.eval()
        size = 2 * max(_PYRAMID_STRIDES)
        total = sum(
            features.sum()
            for features in self(
                torch.zeros(1, 3, size, size, device=parameters[0].device)
            ).values()
        )
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


class _Pyramid(nn.Module):
    """Maps of strides 4 to 64, all of the same width (arXiv:1612.03144)."""

    out_channels = _PYRAMID_WIDTH

    def __init__(self, encoder: nn.Module, norm: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        self.trunk = _Trunk(encoder, _PYRAMID_STRIDES)
        self.pyramid = FeaturePyramidNetwork(
            self.trunk.widths, _PYRAMID_WIDTH, extra_blocks=LastLevelMaxPool(), norm_layer=norm
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.pyramid(self.trunk(images))
        return maps


def _fpn(
    encoder: nn.Module,
    num_outputs: int,
    masks: bool,
    norm: Callable[[int], nn.Module] | None,
    transform: dict[str, Any],
) -> nn.Module:
    detector: nn.Module = (MaskRCNN if masks else FasterRCNN)(
        _Pyramid(encoder, norm), num_outputs, **transform
    )
    return detector


def _c4(
    encoder: nn.Module,
    num_outputs: int,
    masks: bool,
    norm: Callable[[int], nn.Module] | None,
    transform: dict[str, Any],
) -> nn.Module:
    """A detector whose head is the last stage of a ResNet.

    A normalisation follows that stage, as in MoCo (arXiv:1911.05722, Section 4.2).
    """
    if not hasattr(encoder, "layer4"):
        raise ValueError(
            "detector=c4 takes a ResNet's last stage as its head, "
            f"{type(encoder).__name__} has none; take fpn"
        )
    width: int = encoder.feature_info[-1]["num_chs"]  # type: ignore[index,assignment]
    head = nn.Sequential(encoder.layer4, nn.Identity() if norm is None else norm(width))  # type: ignore[arg-type]
    encoder.layer4 = nn.Identity()
    trunk = _Trunk(encoder, (16,))
    trunk.out_channels = trunk.widths[0]  # type: ignore[assignment]
    pool = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0)
    parts: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
        "rpn_pre_nms_top_n_train": 12000,  # there is one map instead of five
        "rpn_pre_nms_top_n_test": 6000,
        "box_roi_pool": pool,
        "box_head": nn.Sequential(head, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "box_predictor": FastRCNNPredictor(width, num_outputs),
    }
    if not masks:
        faster: nn.Module = FasterRCNN(trunk, **parts, **transform)
        return faster
    predictor = MaskRCNNPredictor(width, _MASK_WIDTH, num_outputs)
    detector: nn.Module = MaskRCNN(
        trunk, **parts, mask_roi_pool=pool, mask_head=head, mask_predictor=predictor, **transform
    )
    return detector


DETECTORS: dict[str, Callable[..., nn.Module]] = {"fpn": _fpn, "c4": _c4}
