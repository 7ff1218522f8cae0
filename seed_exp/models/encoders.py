"""timm's networks as encoders; two of them changed into the networks that SEED released."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from seed_exp.base.registry import suggestion
from seed_exp.config.schema.networks import is_place
from seed_exp.models.inputs import IMAGENET_MEAN, IMAGENET_STD, InputSpec
from seed_exp.models.weights import first_line, mismatch, with_counters

# Training options of the released networks; timm's defaults are 0.1, no dropout, no stochastic
# depth.
EFFICIENTNET_TRAINING = {"bn_momentum": 0.01, "drop_rate": 0.2, "drop_path_rate": 0.2}
MOBILENET_DROP_RATE = 0.2


class UnknownNetworkError(ValueError):
    """timm has no network of this name."""


def timm_encoder(name: str | None, **options: Any) -> nn.Module:
    """The network `name` of timm without classifier, randomly initialised.

    Its attribute `num_features` is the width of its pooled output.

    Args:
        name: Name in timm, or a place where timm finds the network: hf-hub:ORG/MODEL,
            local-dir:PATH.
        options: Options of timm.create_model, its architecture's included; `pretrained` downloads
            weights.

    Raises:
        UnknownNetworkError: timm knows no such network; names the closest one, if any is close.
        ValueError: timm cannot make the network, the network does not take the options, or timm
            cannot get the files for it.
    """
    if name is None:
        raise UnknownNetworkError(
            "network=timm needs the network's name in timm, "
            "e.g. student=timm/resnet26 for a student, "
            "teacher.name=vit_small_patch14_dinov2.lvd142m for a teacher"
        )
    if ":" not in name and not timm.is_model(name):
        hint = suggestion(name, timm.list_models())
        raise UnknownNetworkError(
            f"timm has no network {name!r}; {hint}timm.list_models() names all of them"
        )
    given = {key: value for key, value in options.items() if key != "pretrained"}
    options = {"pretrained": False, "num_classes": 0, **options}
    try:
        try:
            encoder: nn.Module = timm.create_model(name, **{"dynamic_img_size": True, **options})
        # Only networks with position embeddings know the option; others take all view sizes anyway.
        except TypeError:
            encoder = timm.create_model(name, **options)
    except TypeError as error:
        if not given:
            raise
        raise ValueError(
            f"timm's {name} does not take all of {given} ({first_line(error)}); leave out what "
            "its architecture has no option for"
        ) from error
    except Exception as error:  # from timm, from the hub's client or from the network
        checked = f"name, {given}" if given else "name"
        raise ValueError(
            f"timm cannot load {name} ({first_line(error)}); check {checked} and connection"
        ) from error
    # If there are layers between pooling and classifier (MobileNetV3), timm's num_features is the
    # width before them.
    encoder.num_features = encoder.head_hidden_size
    return encoder


def input_spec(encoder: nn.Module) -> InputSpec:
    """The images that a network of timm was trained on, and the sizes that it takes."""
    config: dict[str, Any] = encoder.pretrained_cfg  # type: ignore[assignment]
    mean, std = list(config.get("mean", IMAGENET_MEAN)), list(config.get("std", IMAGENET_STD))
    interpolation = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
    if config.get("fixed_input_size") and not getattr(encoder, "dynamic_img_size", False):
        return InputSpec(mean, std, size=config["input_size"][-1], interpolation=interpolation)
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", 1)
    return InputSpec(
        mean,
        std,
        multiple_of=patch if isinstance(patch, int) else patch[0],
        interpolation=interpolation,
    )


def patch_advice(encoder: nn.Module, size: int, option: str) -> str:
    """End of an error about views whose size a ViT's patches do not divide; empty for others.

    Args:
        encoder: The network.
        size: Side of the views in pixels.
        option: Option with the arguments of timm.create_model.
    """
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else patch
    if not isinstance(side, int) or size % side == 0:
        return ""
    return (
        f"; its patches have {side} px: choose sizes that {side} divides, or "
        f"{option}={{dynamic_img_pad: true}}, which pads views with zeros"
    )


def load_encoder(
    encoder: nn.Module, checkpoint: Mapping[str, Any], name: str, source: Path
) -> None:
    """Fills `encoder` from a checkpoint with its tensor names, or with names that timm converts.

    The tensors may be under `state_dict` or `model`. The tensors of timm's classifier, which the
    encoder lacks, are left out.

    Args:
        encoder: The network.
        checkpoint: Result of `read_checkpoint`.
        name: Name of the network, for the error.
        source: The file, for the error.

    Raises:
        ValueError: keys are missing or left over, or a shape differs.
    """
    tensors = checkpoint
    for container in ("state_dict", "model"):
        if isinstance(tensors.get(container), Mapping):
            tensors = tensors[container]
    own = _without_classifier(encoder, tensors)
    if problem := mismatch(encoder.state_dict(), own):
        own = _without_classifier(encoder, _converted(encoder, tensors))
        if mismatch(encoder.state_dict(), own):
            names = "" if is_place(name) else " (timm's names)"
            raise ValueError(f"{source} does not fit the encoder {name}{names}: {problem}")
    encoder.load_state_dict(own)


def _converted(encoder: nn.Module, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors under timm's names; each family of timm knows the names that its authors used."""
    convert = getattr(inspect.getmodule(type(encoder)), "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        converted: Mapping[str, Any] = convert(dict(tensors), encoder)
    except Exception:  # the file is something else entirely
        return tensors
    return converted


def _without_classifier(encoder: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    expected = encoder.state_dict()
    names = getattr(encoder, "default_cfg", {}).get("classifier") or ()
    beginnings = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    own = {
        str(key): value
        for key, value in tensors.items()
        if key in expected or not str(key).startswith(beginnings)
    }
    return with_counters(expected, own)


def efficientnet_b1() -> nn.Module:
    """The released EfficientNet-B1: paddings as for 240 px, where one strided layer pads evenly."""
    encoder = timm_encoder("tf_efficientnet_b1", **EFFICIENTNET_TRAINING)
    block = encoder.get_submodule("blocks.5.0")
    weight: nn.Parameter = block.get_parameter("conv_dw.weight")
    block.conv_dw = nn.Conv2d(
        len(weight), len(weight), 5, stride=2, padding=2, groups=len(weight), bias=False
    )
    block.conv_dw.weight = weight
    return encoder


def mobilenetv3_large(drop_rate: float) -> nn.Module:
    """The released MobileNetV3-Large: blocks activate after squeeze-excite instead of before.

    Args:
        drop_rate: Share of the feature that dropout sets to 0 in training mode.
    """
    encoder = timm_encoder("mobilenetv3_large_100", drop_rate=drop_rate)
    for block in encoder.modules():
        if isinstance(block, InvertedResidual) and isinstance(block.se, SqueezeExcite):
            block.se = _ActivatedSqueezeExcite(block.se, block.bn2.act)
            block.bn2.act = nn.Identity()
    return encoder


class _ActivatedSqueezeExcite(nn.Module):
    """`se`, then `activation`, with the state-dict keys of `se`."""

    def __init__(self, se: SqueezeExcite, activation: nn.Module) -> None:
        super().__init__()
        self.conv_reduce, self.act1, self.conv_expand, self.gate = (
            se.conv_reduce,
            se.act1,
            se.conv_expand,
            se.gate,
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        scale = self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        out: Tensor = self.activation(x * self.gate(scale))
        return out
