"""ResNets of any width under torchvision's names."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from seed_exp.models.teachers import NETWORKS
from seed_exp.models.wide_resnet import WideResNet


def test_width_1_is_the_resnet50_of_torchvision() -> None:
    torch.manual_seed(0)
    reference = torchvision.models.resnet50()
    reference.fc = nn.Identity()
    ours = WideResNet((3, 4, 6, 3))
    ours.load_state_dict(reference.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images), reference.eval()(images))


@pytest.mark.parametrize("name", ["resnet101", "resnet152"])
def test_deeper_networks_have_the_tensors_of_torchvision(name: str) -> None:
    with torch.device("meta"):
        reference, ours = getattr(torchvision.models, name)(), NETWORKS[name]()
    reference.fc = nn.Identity()
    shapes = {key: tensor.shape for key, tensor in reference.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes


@pytest.mark.parametrize(("width", "millions"), [(2, 94), (4, 375), (5, 586)])
def test_every_width_is_multiplied(width: int, millions: int) -> None:
    with torch.device("meta"):
        network = NETWORKS[f"resnet50w{width}"]()
        narrow = NETWORKS["resnet50"]()
        features = network(torch.empty(1, 3, 64, 64))
    assert features.shape == (1, network.num_features) == (1, 2048 * width)
    for key, tensor in narrow.state_dict().items():
        image = key == "conv1.weight"
        expected = [
            size if index > 1 or (image and index == 1) else size * width
            for index, size in enumerate(tensor.shape)
        ]
        assert list(network.state_dict()[key].shape) == expected, key
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions
