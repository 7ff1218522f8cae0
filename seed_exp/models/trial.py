"""One empty image through a network: what is wrong with it is better said before data is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seed_exp.models.weights import first_line


def features_of_empty_image(
    network: nn.Module | Callable[[Tensor], Any],
    size: int,
    whose: str,
    width: int | None,
    advice: str = "",
) -> Tensor:
    """Features [1, D] that a network returns for an image of zeros, in evaluation mode.

    Args:
        network: Maps images to features.
        size: Side of the image in pixels.
        whose: The network, for errors.
        width: Expected D, the network's num_features; None = any.
        advice: End of the error for a size that the network does not take.

    Raises:
        ValueError: the network does not take the image, or returns something else.
    """
    was_training = isinstance(network, nn.Module) and network.training
    if isinstance(network, nn.Module):
        network.eval()
    try:
        with torch.no_grad():  # no inference mode: what the network caches is trained with later
            features = network(torch.zeros(1, 3, size, size))
    except Exception as error:  # the network may be anyone's code
        reason = first_line(error).rstrip(".")
        raise ValueError(
            f"{whose} does not take views of {size} x {size} pixels: {reason}{advice}"
        ) from error
    finally:
        if isinstance(network, nn.Module):
            network.train(was_training)
    return _checked(features, whose, size, width)


def _checked(features: Any, whose: str, size: int, width: int | None) -> Tensor:
    """The output of a network, if it is features [1, width]; else a `ValueError`."""
    expected = f"features [1, {'num_features' if width is None else width}]"
    begin = f"{whose} returns, for an image of {size} x {size} pixels,"
    if not isinstance(features, Tensor):
        raise ValueError(
            f"{begin} a {type(features).__name__}; expected {expected}: return one tensor"
        )
    shape = list(features.shape)
    if features.ndim == 4:
        raise ValueError(
            f"{begin} a map {shape}; expected {expected}: pool it, e.g. features.mean((2, 3))"
        )
    if features.ndim != 2 or len(features) != 1 or not features.is_floating_point():
        raise ValueError(f"{begin} {features.dtype} {shape}; expected {expected}")
    if width is not None and shape[1] != width:
        raise ValueError(
            f"{begin} {shape[1]} features, and its num_features is {width}; "
            "make num_features the width of its output"
        )
    return features
