"""Students that SEED released: the names of their tensors and our names for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor

PREFIX = "module.student."
"""Prefix of a student's tensors under `state_dict`, which also holds teacher and queue."""

# The first stage has no expansion, hence other names. timm numbers the blocks of each stage from 0,
# the files number all blocks in one sequence.
_EFFICIENTNET_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
}
_SQUEEZE_EXCITE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_EFFICIENTNET_FIRST = _SQUEEZE_EXCITE | {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_EFFICIENTNET_BLOCK = _SQUEEZE_EXCITE | {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_MOBILENET_OUTER = {
    "features.0.0": "conv_stem",
    "features.0.1": "bn1",
    "conv.0": "blocks.6.0.conv",
    "conv.1": "blocks.6.0.bn1",
    "classifier.0": "conv_head",
}
_MOBILENET_SQUEEZE_EXCITE = {"5.fc.0": "se.conv_reduce", "5.fc.2": "se.conv_expand"}
_MOBILENET_FIRST = {"0": "conv_dw", "1": "bn1", "4": "conv_pw", "5": "bn2"}
_MOBILENET_BLOCK = _MOBILENET_SQUEEZE_EXCITE | {
    "0": "conv_pw",
    "1": "bn1",
    "3": "conv_dw",
    "4": "bn2",
    "7": "conv_pwl",
    "8": "bn3",
}

Rename = Callable[[str], str]


def _efficientnet(repeats: list[int]) -> Rename:
    """The renaming for an EfficientNet with `repeats` blocks in its stages."""
    places = _places(repeats)

    def rename(layer: str) -> str:
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", layer)
        if match is None:
            return _EFFICIENTNET_OUTER.get(layer, layer)
        names = _EFFICIENTNET_FIRST if int(match[1]) < repeats[0] else _EFFICIENTNET_BLOCK
        return _in_block(places, int(match[1]), names.get(match[2])) or layer

    return rename


def _mobilenet(layer: str) -> str:
    match = re.fullmatch(r"features\.(\d+)\.conv\.([\w.]+)", layer)
    if match is None:
        return _MOBILENET_OUTER.get(layer, layer)
    names = _MOBILENET_FIRST if match[1] == "1" else _MOBILENET_BLOCK
    return _in_block(_places([1, 2, 3, 4, 2, 3]), int(match[1]) - 1, names.get(match[2])) or layer


def _places(repeats: list[int]) -> list[tuple[int, int]]:
    """(stage, number within the stage) of each block."""
    return list(
        chain.from_iterable(
            [(stage, number) for number in range(num)] for stage, num in enumerate(repeats)
        )
    )


def _in_block(places: list[tuple[int, int]], index: int, name: str | None) -> str | None:
    if name is None or not 0 <= index < len(places):
        return None
    stage, number = places[index]
    return f"blocks.{stage}.{number}.{name}"


RELEASED: dict[str, Rename] = {
    "resnet18": lambda layer: layer,
    "resnet34": lambda layer: layer,
    "resnet50": lambda layer: layer,
    "mobilenetv3_large": _mobilenet,
    "efficientnet_b0": _efficientnet([1, 2, 2, 3, 3, 4, 1]),
    "efficientnet_b1": _efficientnet([2, 3, 3, 4, 4, 5, 2]),
}
"""Student network -> function from a layer's name in a released file to its name in timm."""


def is_released(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the checkpoint holds a student as SEED released it."""
    tensors = checkpoint.get("state_dict")
    return isinstance(tensors, Mapping) and any(str(key).startswith(PREFIX) for key in tensors)


def released_tensors(checkpoint: Mapping[str, Any], network: str) -> dict[str, Any]:
    """The tensors of a released student under the names of our `Student`.

    The encoder's are `encoder.` with timm's names; the head's are `head.0` and `head.2`, in the
    file `fc.0` and `fc.2`. A tensor without counterpart keeps its name.

    Args:
        checkpoint: Content of the file.
        network: Key of RELEASED: the network that the file is assumed to hold.
    """
    out = {}
    for key, value in checkpoint["state_dict"].items():
        if not str(key).startswith(PREFIX):
            continue
        layer, _, parameter = str(key).removeprefix(PREFIX).rpartition(".")
        if layer.startswith("fc."):
            out[f"head.{layer.removeprefix('fc.')}.{parameter}"] = value
            continue
        name = RELEASED[network](layer)
        # Linear layers of the file are 1x1 convolutions in timm.
        if isinstance(value, Tensor) and value.ndim == 2:
            value = value[:, :, None, None]
        out[f"encoder.{name}.{parameter}"] = value
    return out
