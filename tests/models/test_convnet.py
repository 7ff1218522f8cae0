"""The small encoder for digits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from seed_exp.models.convnet import ConvNet


@pytest.mark.parametrize("size", [32, 28, 17])
def test_convnet_is_four_convolutions_and_an_average(size: int) -> None:
    torch.manual_seed(0)
    net = ConvNet(width=2).eval()
    images = torch.randn(3, 3, size, size)
    out = images
    for index, stride in enumerate([1, 2, 2, 2]):
        convolution, norm = net.layers[3 * index], net.layers[3 * index + 1]
        out = F.relu(norm(F.conv2d(out, convolution.weight, stride=stride, padding=1)))
    torch.testing.assert_close(net(images), out.flatten(2).mean(2))
    assert net(images).shape == (3, net.num_features) == (3, 16)
