"""Four-layer convolutional encoder for images of about 32 px, such as the embedded digits."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Four 3x3 convolutions (BN, ReLU) of `width` x 1, 2, 4, 8 channels, then average pooling.

    All convolutions but the first halve the image.

    `forward` maps images [N, 3, H, W] of any size to features [N, 8 * width].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for index in range(4):
            stride = 1 if index == 0 else 2
            layers += [
                nn.Conv2d(widths[index], widths[index + 1], 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[index + 1]),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers)
        self.num_features = widths[-1]

    def forward_features(self, images: Tensor) -> Tensor:
        """Feature maps [N, 8 * width, H / 8, W / 8]."""
        maps: Tensor = self.layers(images)
        return maps

    def forward_head(self, maps: Tensor) -> Tensor:
        """Features [N, 8 * width] of feature maps."""
        return maps.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))
