"""Batch norm by groups of a batch, as if each group were the batch of a GPU of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norm(network: nn.Module) -> bool:
    """Whether any layer normalises by statistics of the batch."""
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def number_of_groups(num_images: int, group_size: int | None) -> int:
    """Number of groups of at least `group_size` images each; None = one group."""
    return 1 if group_size is None else max(1, num_images // group_size)


def forward_in_groups(network: nn.Module, images: Tensor, group_size: int | None) -> Tensor:
    """Outputs [N, D] of a network in training mode that normalises each group by itself.

    MoCo's results come from GPUs that see 32 images each (arXiv:1911.05722, Section 3.3). Running
    statistics move once, towards the mean of the groups' statistics.

    Args:
        network: Any network, also one that DDP wraps.
        images: Images [N, 3, S, S].
        group_size: Images of a group; groups are contiguous. Their sizes differ by one image at
            most where N is no multiple. None = all images are one group.
    """
    num_groups = number_of_groups(len(images), group_size)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    if num_groups == 1 or not norms:
        outputs: Tensor = network(images)
        return outputs
    # `.data`: autograd notes changes of buffers that a forward pass has used, though none is needed
    # for a backward pass.
    running = [
        buffer.data
        for norm in norms
        for buffer in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        if buffer is not None
    ]
    before = [buffer.clone() for buffer in running]
    moved = [torch.zeros_like(buffer) for buffer in running]
    parts = []
    for group in images.tensor_split(num_groups):
        parts.append(network(group))
        torch._foreach_add_(moved, running)
        torch._foreach_copy_(running, before)
    for buffer, total in zip(running, moved, strict=True):
        buffer.copy_(total / num_groups)
    return torch.cat(parts)
