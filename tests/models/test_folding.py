"""Folded networks compute the same as before, faster.

What cannot be folded safely is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.models.convnet import ConvNet
from seed_exp.models.encoders import timm_encoder
from seed_exp.models.folding import fold_batch_norm
from seed_exp.models.teachers import NETWORKS


def images(num: int = 8, size: int = 32) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def lived(network: nn.Module) -> nn.Module:
    """The network as training might have left it.

    Its statistics are those of its own activations; scales and shifts are not 1 and 0.
    """
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(std=math.sqrt(2 / module.weight[0].numel()))
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.1)
            module.reset_running_stats()
            module.momentum = 1.0
    network.train()(2 + images())
    return network.eval()


@torch.no_grad()
def error_of_folding(network: nn.Module) -> float:
    """Largest change of a feature, over the largest feature."""
    before = network(images())
    fold_batch_norm(network)
    return ((network(images()) - before).abs().max() / before.abs().max()).item()


def num_batch_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


# Not resnet50w4 and w5: they are resnet50w2 but for their gigabytes.
@pytest.mark.parametrize(
    "name",
    ["resnet50", "resnet101", "resnet152", pytest.param("resnet50w2", marks=pytest.mark.slow)],
)
def test_every_teacher_network_folds_wholly_and_computes_the_same(name: str) -> None:
    with torch.device("meta"):
        network = NETWORKS[name]()
    network = lived(network.to_empty(device="cpu"))
    assert num_batch_norms(network) > 50
    assert error_of_folding(network) < 1e-5
    assert num_batch_norms(network) == 0


@pytest.mark.parametrize(
    "build",
    [lambda: ConvNet(4), lambda: timm_encoder("resnet18"), lambda: timm_encoder("resnet26d")],
)
def test_encoders_of_our_own_runs_fold_wholly_and_compute_the_same(
    build: Callable[[], nn.Module],
) -> None:
    network = lived(build())
    assert error_of_folding(network) < 1e-5
    assert num_batch_norms(network) == 0


@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "mobilenetv3_small_050", "test_vit"])
def test_a_network_that_cannot_be_traced_stays_as_it_is(name: str) -> None:
    network = lived(timm_encoder(name)) if name != "test_vit" else timm_encoder(name).eval()
    layers = list(network.modules())
    assert error_of_folding(network) == 0
    assert list(network.modules()) == layers


class Branches(nn.Module):
    """A convolution, then batch norm, in the ways that forbid to fold one into the other."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3, track_running_stats=way != "statistics of the batch")
        self.other = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.way == "output used twice":
            return self.norm(out) + out
        if self.way == "two norms of one output":
            return self.norm(out) - 2 * self.other(out)
        if self.way == "convolution called twice":
            return self.norm(out) + self.conv(x)
        if self.way == "norm called twice":
            return self.norm(out) + self.norm(x)
        if self.way == "weight read elsewhere":
            return self.norm(out) + F.conv2d(x, self.conv.weight, padding=1)
        if self.way == "something in between":
            return self.norm(out.relu())
        return self.norm(out)


@pytest.mark.parametrize(
    "way",
    [
        "output used twice",
        "two norms of one output",
        "convolution called twice",
        "norm called twice",
        "weight read elsewhere",
        "something in between",
        "statistics of the batch",
    ],
)
def test_what_is_needed_elsewhere_is_not_folded(way: str) -> None:
    network = lived(Branches(way))
    layers = list(network.modules())
    assert error_of_folding(network) == 0
    assert list(network.modules()) == layers


def test_a_layer_under_two_names_is_replaced_under_both() -> None:
    network = Branches("")
    network.alias = nn.Sequential(network.conv, network.norm)
    network.conv = network.alias[0]
    lived(network)
    assert error_of_folding(network) < 1e-5
    assert type(network.norm) is type(network.alias[1]) is nn.Identity
    assert network.alias[0] is network.conv


def test_the_fold_is_that_of_the_formula() -> None:
    network = lived(
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, groups=1, bias=True), nn.BatchNorm2d(4, eps=0.1))
    )
    conv, norm = network[0], network[1]
    scale = norm.weight.double() / (norm.running_var.double() + 0.1).sqrt()
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = (conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    fold_batch_norm(network)
    assert torch.equal(network[0].weight, weight.float())
    assert torch.equal(network[0].bias, bias.float())


def test_a_frozen_network_stays_frozen_and_in_its_memory_format() -> None:
    network = ConvNet(4).requires_grad_(False).eval().to(memory_format=torch.channels_last)
    fold_batch_norm(network)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
    assert network.layers[3].weight.is_contiguous(memory_format=torch.channels_last)
