"""Linear classifiers of the pixels of frozen feature maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.config.schema import IGNORED
from seed_exp.engine.method import Method
from seed_exp.views.recipe import HostBatch

Prepared = tuple[dict[str, Tensor], Tensor]


class SegmentationProbe(Method):
    """One linear classifier of pixels per encoder; the encoders see the same crops.

    DINOv2's linear protocol (arXiv:2304.07193, Section 7.4): the encoder is frozen, and batch norm
    and a 1 x 1 convolution map its last map to logits, which are enlarged to the image's size.

    Args:
        encoders: Functions from images [N, 3, S, S] to maps [N, C, h, w], by name.
        classifiers: Classifier of each encoder, see `pixel_classifier`.
    """

    def __init__(
        self, encoders: Mapping[str, nn.Module], classifiers: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.encoders = dict(encoders)
        # Not a ModuleDict: its names must not contain dots.
        self.shared = nn.ModuleList(encoders.values()).requires_grad_(False).eval()
        self.trainable = dict(classifiers)

    def train(self, mode: bool = True) -> SegmentationProbe:  # noqa: ARG002
        """Keeps evaluation mode, because the encoders' BN statistics must not move."""
        return super().train(False)

    @torch.no_grad()
    def prepare(self, views: dict[str, Tensor], batch: HostBatch) -> Prepared:  # noqa: ARG002
        """Returns each encoder's maps [N, C, h, w] of the crops, and the masks, int64 [N, S, S]."""
        crops = views["global"][0]
        maps = {name: encoder(crops).float() for name, encoder in self.encoders.items()}
        return maps, views["mask"][0][:, 0].long()

    def loss(self, name: str, network: nn.Module, prepared: Prepared) -> dict[str, Tensor]:
        """Returns cross-entropy in nats and accuracy in percent: means over pixels with a class."""
        maps, masks = prepared
        with torch.autocast(masks.device.type, enabled=False):
            logits = enlarged(network(maps[name]), masks.shape[1:])
        counted = masks != IGNORED
        # Not the mean of F.cross_entropy: a batch may have no pixel with a class. Its sum has no
        # deterministic form on a GPU.
        num = counted.sum().clamp(min=1)
        losses = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="none")
        loss = losses.sum() / num
        right = ((logits.detach().argmax(1) == masks) & counted).sum()
        return {"loss": loss, "train_pixel_accuracy": 100 * right.float() / num}

    def logits(self, name: str, images: Tensor) -> Tensor:
        """Returns logits [N, C, h, w] of images [N, 3, S, S], as small as the encoder's maps."""
        maps = self.encoders[name](images).float()
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.trainable[name](maps)
        return logits

    def compile_shared(self) -> None:
        """Compiles the encoders."""
        for encoder in self.shared:
            encoder.compile(dynamic=False)


def pixel_classifier(width: int, num_classes: int) -> nn.Module:
    """Batch norm, then a 1 x 1 convolution: maps [N, width, h, w] to logits [N, classes, h, w].

    The weights start from N(0, 0.01^2), drawn from torch's generator.
    """
    convolution = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(nn.BatchNorm2d(width), convolution)


def enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [N, C, h, w] at another size, bilinear: [N, C, *size], float32."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)
