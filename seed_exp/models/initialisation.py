"""Random weights as SEED's released code draws them, where timm's networks draw others."""

from __future__ import annotations

import math

from torch import nn

from seed_exp.base.registry import lookup


def initialise_as_released(network: str, encoder: nn.Module, head: nn.Module) -> None:
    """Draws the weights of a fresh student anew, in place, by the rule of its released network.

    Args:
        network: Key of RULES.
        encoder: The network, as timm initialises it.
        head: Its projection head, as torch initialises it.
    """
    lookup(RULES, network, "network that SEED released")(encoder, head)


def _resnet(encoder: nn.Module, head: nn.Module) -> None:  # noqa: ARG001
    """As timm's, but no block begins as the identity: the last batch norm has scale 1, not 0."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)


def _efficientnet(encoder: nn.Module, head: nn.Module) -> None:  # noqa: ARG001
    """Torch's default for convolutions."""
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()


def _mobilenet(encoder: nn.Module, head: nn.Module) -> None:
    """Convolutions N(0, 2 / (k^2 C_out)), whatever their groups; linear layers N(0, 0.01^2).

    The layers that are linear in the released code are 1 x 1 convolutions here: those of
    squeeze-excite, and the last one. So is the head's last layer; its first one keeps torch's
    default, because the released code puts it before the network once that is initialised.
    """
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            is_linear = name == "conv_head" or ".se." in name
            fan_out = math.prod(module.kernel_size) * module.out_channels
            _normal(module, 0.01 if is_linear else math.sqrt(2 / fan_out))
    last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    _normal(last, 0.01)


def _normal(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


RULES = {
    "resnet18": _resnet,
    "resnet34": _resnet,
    "resnet50": _resnet,
    "mobilenetv3_large": _mobilenet,
    "efficientnet_b0": _efficientnet,
    "efficientnet_b1": _efficientnet,
}
"""Network -> function that draws encoder and head anew."""
