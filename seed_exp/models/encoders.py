"""timm's networks as encoders, with the changes that make two of them the networks that SEED released."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

# To train as released; timm's defaults are 0.1, no dropout and no stochastic depth.
EFFICIENTNET_TRAINING = {"bn_momentum": 0.01, "drop_rate": 0.2, "drop_path_rate": 0.2}


def timm_encoder(name: str | None, **options: Any) -> nn.Module:
    """The network `name` of timm without classifier, randomly initialised; `num_features` is the width of its pooled output.

    Raises:
        ValueError: timm knows no such network; names the closest one.
    """
    if name is None:
        raise ValueError("network=timm needs the network's name in timm, e.g. students.timm.name=resnet26")
    if not timm.is_model(name):
        matches = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0)
        raise ValueError(f"timm has no network {name!r}; did you mean {matches[0]!r}?")
    options = {"pretrained": False, "num_classes": 0, **options}
    try:
        encoder: nn.Module = timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError:  # only networks with position embeddings know the option, and only they need it for several view sizes
        encoder = timm.create_model(name, **options)
    # Where layers stand between pooling and classifier (MobileNetV3), timm's num_features is the width in front of them.
    encoder.num_features = encoder.head_hidden_size
    return encoder


def efficientnet_b1() -> nn.Module:
    """The released EfficientNet-B1: its paddings are those for 240 px, where one strided convolution pads evenly."""
    encoder = timm_encoder("tf_efficientnet_b1", **EFFICIENTNET_TRAINING)
    block = encoder.get_submodule("blocks.5.0")
    weight: nn.Parameter = block.get_parameter("conv_dw.weight")
    block.conv_dw = nn.Conv2d(len(weight), len(weight), 5, stride=2, padding=2, groups=len(weight), bias=False)
    block.conv_dw.weight = weight
    return encoder


def mobilenetv3_large() -> nn.Module:
    """The released MobileNetV3-Large: in blocks with squeeze-excite, the activation comes after it instead of before it."""
    encoder = timm_encoder("mobilenetv3_large_100")
    for block in encoder.modules():
        if isinstance(block, InvertedResidual) and isinstance(block.se, SqueezeExcite):
            block.se = _ActivatedSqueezeExcite(block.se, block.bn2.act)
            block.bn2.act = nn.Identity()
    return encoder


class _ActivatedSqueezeExcite(nn.Module):
    """`se`, then `activation`; the keys stay those of `se`."""

    def __init__(self, se: SqueezeExcite, activation: nn.Module) -> None:
        super().__init__()
        self.conv_reduce, self.act1, self.conv_expand, self.gate = se.conv_reduce, se.act1, se.conv_expand, se.gate
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        scale = self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        out: Tensor = self.activation(x * self.gate(scale))
        return out
