"""Projection heads: from the encoder's feature to the embedding that is compared."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn


def projection_head(
    in_dim: int, hidden_dim: int | None, out_dim: int, *, deep: bool = False
) -> nn.Sequential:
    """Linear(in_dim, hidden_dim), ReLU, Linear(hidden_dim, out_dim).

    `hidden_dim` None is `in_dim`, as SEED released it; 0 is Linear(in_dim, out_dim) alone, the head
    of CompRess with one queue, arXiv:2010.14713. The deep head of SimReg, arXiv:2201.05131,
    is two such pairs with batch norm, the first of which ends in `in_dim`; there `hidden_dim` None
    is 2 x `in_dim`.
    """
    if deep:
        hidden_dim = 2 * in_dim if hidden_dim is None else hidden_dim
        pairs = [
            [
                nn.Linear(in_dim, hidden_dim),
                nn.BatchNorm1d(hidden_dim),
                nn.ReLU(inplace=True),
                nn.Linear(hidden_dim, width),
            ]
            for width in (in_dim, out_dim)
        ]
        return nn.Sequential(*pairs[0], *pairs[1])
    if hidden_dim == 0:
        return nn.Sequential(nn.Linear(in_dim, out_dim))
    hidden_dim = in_dim if hidden_dim is None else hidden_dim
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim)
    )


def head_from_layers(layers: str, in_dim: int, hidden_dim: int, out_dim: int) -> nn.Module:
    """The head with these layers, named as by `head_layers`.

    The last linear layer ends in `out_dim`, the others in `hidden_dim`. Without layers the head
    returns its input.
    """
    names = layers.split("-") if layers else []
    built: list[nn.Module] = []
    dim = in_dim
    for index, name in enumerate(names):
        if name == "Linear":
            width = hidden_dim if "Linear" in names[index + 1 :] else out_dim
            built.append(nn.Linear(dim, width))
            dim = width
        else:
            built.append(nn.BatchNorm1d(dim) if name == "BatchNorm1d" else nn.ReLU())
    return built[0] if len(built) == 1 else nn.Sequential(*built)


def head_from_keys(tensors: Mapping[str, Tensor]) -> nn.Module:
    """The head with the keys and shapes of `tensors`, as files of one convention may differ in it.

    Keys `weight` and `bias` make a linear layer. Otherwise `<i>.weight` is a linear layer where it
    has two dimensions and a BatchNorm1d where it has one, `<i>.running_mean` alone a BatchNorm1d
    without scale and shift, and a number without either before another with one is a ReLU. Any
    other key is not in the head's state dict. The values are not loaded.
    """
    if "weight" in tensors:
        return _layer(tensors, "")
    numbers = [
        int(match[1])
        for key in tensors
        if (match := re.fullmatch(r"(\d{1,2})\.(?:weight|running_mean)", key))
    ]
    return nn.Sequential(
        *(_layer(tensors, f"{number}.") for number in range(max(numbers, default=-1) + 1))
    )


def head_layers(head: nn.Module) -> str:
    """Class names of the head's layers, e.g. Linear-ReLU-Linear; empty if it has no layers."""
    layers = head if isinstance(head, nn.Sequential) else [head]
    return "-".join(type(layer).__name__ for layer in layers)


def _layer(tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
    weight, mean = tensors.get(prefix + "weight"), tensors.get(prefix + "running_mean")
    if weight is None:
        return nn.ReLU() if mean is None else nn.BatchNorm1d(mean.numel(), affine=False)
    if weight.ndim == 1:
        return nn.BatchNorm1d(len(weight))
    if weight.ndim != 2:
        return nn.Identity()  # has no such key
    return nn.Linear(weight.shape[1], weight.shape[0], bias=prefix + "bias" in tensors)
