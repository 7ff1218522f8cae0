"""Feature maps of an encoder: its features before they are pooled over the image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


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


def last_maps(encoder: nn.Module, images: Tensor) -> Tensor:
    """The maps [N, C, H, W] of `feature_maps` alone, without the layers behind them."""
    unpooled: Tensor = encoder.forward_features(images)  # type: ignore[operator]
    return _as_maps(encoder, unpooled, images.shape[-1])


def _as_maps(encoder: nn.Module, unpooled: Tensor, size: int) -> Tensor:
    if unpooled.ndim == 3:  # tokens [N, T, C]
        tokens = unpooled[:, getattr(encoder, "num_prefix_tokens", 0) :]
        embedding: Any = encoder.patch_embed
        side = -(-size // embedding.patch_size[0])  # rounded up: some pad the image
        return tokens.transpose(1, 2).reshape(*tokens.shape[::2], side, side)
    if getattr(encoder, "output_fmt", "NCHW") == "NHWC":
        unpooled = unpooled.permute(0, 3, 1, 2)
    return unpooled
