"""Cost of a network, counted without a clock."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def forward_flops(network: nn.Module, size: int) -> int:
    """Floating-point operations of a forward pass for one image of `size` x `size` pixels.

    A multiply-add counts as two. The network's mode (training or evaluation) stays as it is.
    """
    was_training = network.training
    device = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, size, size, device=device))
    network.train(was_training)
    return int(counter.get_total_flops())
