from __future__ import annotations

import torch
from torch import nn

from seed_exp.models.cost import forward_flops


def test_flops_are_those_of_the_convolution_counted_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5))
    assert forward_flops(network, 8) == 2 * 8 * 8 * 5 * 3 * 9
    assert forward_flops(network, 16) == 4 * forward_flops(network, 8)


def test_counting_leaves_mode_and_statistics_as_they_were() -> None:
    network = nn.BatchNorm2d(3).train()
    forward_flops(network, 4)
    assert network.training
    assert network.num_batches_tracked == 0
    assert not forward_flops(network.eval(), 4)
    assert not network.training
    assert torch.equal(network.running_mean, torch.zeros(3))
