"""Bottleneck ResNets with all widths multiplied, also the stem's: MoCo's, SimCLR's, SwAV's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck


class WideResNet(nn.Module):
    """ResNet-50/101/152 with torchvision's key names, without classifier.

    With `width` 1 it is torchvision's network. SwAV's RN50w2, w4, w5 are `width` 2, 4, 5.
    torchvision's and timm's `wide_resnet50_2` is another network: it widens the 3x3 convolutions
    only. `forward` maps images [N, 3, H, W] to features [N, 2048 * width].

    Args:
        num_blocks: Blocks per stage, e.g. (3, 4, 6, 3) for ResNet-50.
        width: Factor of all widths.
    """

    def __init__(self, num_blocks: Sequence[int], width: int = 1) -> None:
        super().__init__()
        self.in_dim = 64 * width
        self.conv1 = nn.Conv2d(3, self.in_dim, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(self.in_dim)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(64 * width, num_blocks[0], stride=1)
        self.layer2 = self._stage(128 * width, num_blocks[1], stride=2)
        self.layer3 = self._stage(256 * width, num_blocks[2], stride=2)
        self.layer4 = self._stage(512 * width, num_blocks[3], stride=2)
        self.num_features = self.in_dim

    def _stage(self, dim: int, num_blocks: int, stride: int) -> nn.Sequential:
        out_dim = dim * Bottleneck.expansion
        downsample = nn.Sequential(
            nn.Conv2d(self.in_dim, out_dim, 1, stride, bias=False), nn.BatchNorm2d(out_dim)
        )
        first = Bottleneck(self.in_dim, dim, stride, downsample)
        self.in_dim = out_dim
        return nn.Sequential(first, *(Bottleneck(out_dim, dim) for _ in range(num_blocks - 1)))

    def forward_features(self, images: Tensor) -> Tensor:
        """Feature maps [N, 2048 * width, H / 32, W / 32]."""
        out: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = stage(out)
        return out

    def forward_head(self, maps: Tensor) -> Tensor:
        """Features [N, 2048 * width] of feature maps."""
        return maps.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))
