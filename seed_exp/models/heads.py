"""Projection heads: from the encoder's feature to the embedding that is compared."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn


def projection_head(in_dim: int, hidden_dim: int | None, out_dim: int) -> nn.Sequential:
    """Linear(in_dim, hidden_dim), ReLU, Linear(hidden_dim, out_dim); `hidden_dim` null is `in_dim`, as SEED released it."""
    hidden_dim = in_dim if hidden_dim is None else hidden_dim
    return nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim))


def head_from_keys(tensors: Mapping[str, Tensor]) -> nn.Module:
    """The head that has the keys and shapes of `tensors`: files of one convention may differ in their head's layers.

    Keys `weight` and `bias` make a linear layer. Otherwise `<i>.weight` is a linear layer where it has two dimensions and a
    BatchNorm1d where it has one, and a number without weight before another with one is a ReLU. Any other key is not in the
    head's state dict. The values are not loaded.
    """
    if "weight" in tensors:
        return _layer(tensors, "")
    numbers = [int(key.removesuffix(".weight")) for key in tensors if re.fullmatch(r"\d{1,2}\.weight", key)]
    return nn.Sequential(*(_layer(tensors, f"{number}.") for number in range(max(numbers, default=-1) + 1)))


def head_layers(head: nn.Module) -> str:
    """Class names of the head's layers, e.g. Linear-ReLU-Linear."""
    layers = head if isinstance(head, nn.Sequential) else [head]
    return "-".join(type(layer).__name__ for layer in layers)


def _layer(tensors: Mapping[str, Tensor], prefix: str) -> nn.Module:
    weight = tensors.get(prefix + "weight")
    if weight is None:
        return nn.ReLU()
    if weight.ndim == 1:
        return nn.BatchNorm1d(len(weight))
    return nn.Linear(weight.shape[1], weight.shape[0], bias=prefix + "bias" in tensors)
