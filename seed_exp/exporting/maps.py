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
    if unpooled.ndim == 3:  # tokens [N, T, C]
        tokens = unpooled[:, getattr(encoder, "num_prefix_tokens", 0) :]
        embedding: Any = encoder.patch_embed
        side = images.shape[-1] // embedding.patch_size[0]
        return features, tokens.transpose(1, 2).reshape(*tokens.shape[::2], side, side)
    if getattr(encoder, "output_fmt", "NCHW") == "NHWC":
        unpooled = unpooled.permute(0, 3, 1, 2)
    return features, unpooled
