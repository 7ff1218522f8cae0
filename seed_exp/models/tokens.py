"""A vision transformer's tokens as features: its class token, and the mean of its patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seed_exp.config.schema import TeacherEmbedding

TOKENS = {
    TeacherEmbedding["cls"]: ("cls",),
    TeacherEmbedding["mean_patch"]: ("mean_patch",),
    TeacherEmbedding["cls+mean_patch"]: ("cls", "mean_patch"),
}
"""Parts of each embedding that is made of tokens, in their order."""


class TokenPooling(nn.Module):
    """An encoder of timm whose features are made of its last tokens.

    `cls` is the class token. `mean_patch` is the mean over the patches, without class token and
    registers. Both come behind the last layer's norm, as in timm's own pooling.

    Args:
        encoder: A vision transformer of timm.
        embedding: Key of TOKENS.

    Raises:
        ValueError: the encoder has no such tokens.
    """

    def __init__(self, encoder: nn.Module, embedding: TeacherEmbedding) -> None:
        super().__init__()
        given = f"teacher.embedding={embedding.value}"
        if not isinstance(getattr(encoder, "num_prefix_tokens", None), int):
            raise ValueError(
                f"{given} is for vision transformers of timm; {type(encoder).__name__} has no "
                "tokens of patches: teacher.embedding=features is its pooled output, the mean of "
                "the last map in most convolutional networks"
            )
        self.parts = TOKENS[embedding]
        if "cls" in self.parts and getattr(encoder, "cls_token", None) is None:
            raise ValueError(
                f"{given} needs a class token, which this {type(encoder).__name__} does not have; "
                "teacher.embedding=mean_patch or features"
            )
        self.encoder = encoder
        width: int = encoder.embed_dim  # type: ignore[assignment]
        self.num_features = width * len(self.parts)
        self.num_prefix_tokens: int = encoder.num_prefix_tokens  # type: ignore[assignment]

    @property
    def patch_embed(self) -> Any:
        """The encoder's; `feature_maps` takes the size of its patches."""
        return self.encoder.patch_embed

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens [N, T, C] of images [N, 3, H, W]."""
        tokens: Tensor = self.encoder.forward_features(images)  # type: ignore[operator]
        return tokens

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Features [N, num_features] of all tokens."""
        pooled = {"cls": tokens[:, 0], "mean_patch": tokens[:, self.num_prefix_tokens :].mean(1)}
        norm = getattr(self.encoder, "fc_norm", nn.Identity())  # where timm norms behind pooling
        return torch.cat([norm(pooled[part]) for part in self.parts], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, num_features] of images [N, 3, H, W]."""
        return self.forward_head(self.forward_features(images))
