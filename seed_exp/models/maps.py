"""Feature maps of an encoder: its features before they are pooled over the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from seed_exp.models.weights import first_line

WITHOUT = "set objective.dense_weight=0 to leave maps out"
"""End of the errors about networks without maps."""


def has_maps(encoder: nn.Module) -> bool:
    """Whether the encoder says which of its steps comes before pooling."""
    return hasattr(encoder, "forward_features") and hasattr(encoder, "forward_head")


def feature_maps(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features [N, num_features] and the maps [N, C, H, W] that they were pooled from.

    The maps of a transformer are its patch tokens, without class and register tokens. C differs
    from num_features where layers follow the pooling, as in MobileNetV3.

    Args:
        encoder: An encoder with maps.
        images: Square images [N, 3, S, S].
    """
    unpooled: Tensor = encoder.forward_features(images)  # type: ignore[operator]
    features: Tensor = encoder.forward_head(unpooled)  # type: ignore[operator]
    return features, _as_maps(encoder, unpooled, images.shape[-1])


def map_of_empty_image(
    encoder: nn.Module,
    size: int,
    whose: str,
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
) -> tuple[int, int, int]:
    """Shape C, H, W of the maps that an encoder has of views, in evaluation mode.

    Args:
        encoder: Any network.
        size: Side of the views in pixels.
        whose: The network, for errors.
        prepare: Makes the encoder's images of views.

    Raises:
        ValueError: it has no maps, or its patches cover more than the view.
    """
    if not has_maps(encoder):
        raise ValueError(
            f"{whose} has no spatial map to compare: {type(encoder).__name__} does not say what "
            "comes before pooling (forward_features and forward_head, as networks of timm have); "
            f"{WITHOUT}"
        )
    begin = f"{whose} has no spatial map of views of {size} x {size} pixels"
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            images = prepare(torch.zeros(1, 3, size, size))
            maps = feature_maps(encoder, images)[1]
    except Exception as error:  # the network may be anyone's code
        raise ValueError(f"{begin}: {first_line(error).rstrip('.')}; {WITHOUT}") from error
    finally:
        encoder.train(was_training)
    if maps.ndim != 4:
        raise ValueError(f"{begin}: its forward_features gives {list(maps.shape)}; {WITHOUT}")
    if problem := _padding(encoder, images.shape[-1], maps):
        raise ValueError(f"{whose} {problem} divides, or {WITHOUT}")
    return maps.shape[1], maps.shape[2], maps.shape[3]


class LastMaps(nn.Module):
    """Maps images [N, 3, S, S] to the maps [N, C, H, W] of `feature_maps`, without pooling them.

    Args:
        encoder: An encoder.
        size: Side S of the images in pixels, on which it is tried.
        whose: The encoder, for errors.

    Raises:
        ValueError: the encoder has no maps, or does not take images of this size.
    """

    width: int
    """Number C of channels."""

    def __init__(self, encoder: nn.Module, size: int, whose: str) -> None:
        super().__init__()
        self.encoder = encoder
        if not has_maps(encoder):
            raise ValueError(
                f"{whose} has no feature maps: its network has no forward_features and "
                "forward_head, as those of timm and of this package have"
            )
        device = next(encoder.parameters()).device
        begin = f"{whose} gives no feature maps of images of {size} x {size} pixels"
        try:
            with torch.no_grad():
                maps = self(torch.zeros(1, 3, size, size, device=device))
        except Exception as error:  # the network may be anyone's code
            raise ValueError(f"{begin}: {first_line(error).rstrip('.')}") from error
        if maps.ndim != 4 or len(maps) != 1:
            raise ValueError(f"{begin} but {list(maps.shape)}; expected [1, C, H, W]")
        if problem := _padding(encoder, size, maps):
            raise ValueError(f"{whose} {problem} divides")
        self.width = maps.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        unpooled: Tensor = self.encoder.forward_features(images)  # type: ignore[operator]
        return _as_maps(self.encoder, unpooled, images.shape[-1])


def _padding(encoder: nn.Module, size: int, maps: Tensor) -> str:
    """Why maps cover more than the images, and how to begin a mend; empty if they do not."""
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple) or size % patch[0] == 0:
        return ""
    return (
        f"pads images of {size} pixels to whole patches of {patch[0]}, so its grid of "
        f"{maps.shape[2]} x {maps.shape[3]} covers more than the image and cannot be aligned; "
        f"choose sizes that {patch[0]}"
    )


def _as_maps(encoder: nn.Module, unpooled: Tensor, size: int) -> Tensor:
    if unpooled.ndim == 3:  # tokens [N, T, C]
        tokens = unpooled[:, getattr(encoder, "num_prefix_tokens", 0) :]
        embedding: Any = encoder.patch_embed
        side = -(-size // embedding.patch_size[0])  # rounded up: some pad the image
        return tokens.transpose(1, 2).reshape(*tokens.shape[::2], side, side)
    if getattr(encoder, "output_fmt", "NCHW") == "NHWC":
        unpooled = unpooled.permute(0, 3, 1, 2)
    return unpooled
