"""How an exported encoder is loaded without this package: lines to paste, which export itself runs before it gives them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from torch import nn

from seed_exp.config.schema import StudentConfig

WEIGHTS = "model.safetensors"
LOADER = "load.py"

IN_TORCHVISION = frozenset(
    {
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "wide_resnet50_2",
        "wide_resnet101_2",
    }
)
"""Networks that timm and torchvision have under the same name, with the same names of tensors less the classifier `fc`."""

CHANGES: dict[str, tuple[str, str]] = {
    "efficientnet_b1": (
        "one strided convolution padded as for images of 240 px, whatever their size",
        """    block = model.blocks[5][0]
    channels, weight = block.conv_dw.groups, block.conv_dw.weight
    block.conv_dw = nn.Conv2d(channels, channels, 5, stride=2, padding=2, groups=channels, bias=False)
    block.conv_dw.weight = weight
""",
    ),
    "mobilenetv3_large": (
        "the activation behind squeeze-excite instead of before it",
        """    for block in [block for stage in model.blocks for block in stage]:
        if hasattr(block, "conv_pwl") and not isinstance(block.se, nn.Identity):
            block.se, block.bn2.act = nn.Sequential(block.se, block.bn2.act), nn.Identity()
""",
    ),
}
"""By student that timm has only nearly: what differs, and the lines that make timm's network `model` the student's."""

_LOADER = '''"""The encoder of this folder: timm's {architecture} with {difference}.

timm's own takes the same weights without an error, and gives other features. Needs torch, timm, safetensors.
"""

from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import nn


def load(path=Path(__file__).with_name("{weights}")):
    """Maps images [N, 3, H, W], normalised, to features [N, {num_features}]; in evaluation mode."""
    model = timm.create_model("{architecture}", num_classes=0)
    model.load_state_dict(load_file(path))
{lines}    return model.eval()
'''


def architecture_of(encoder: nn.Module) -> str | None:
    """Name of the network in timm; None for one that timm does not have."""
    config: dict[str, Any] = getattr(encoder, "pretrained_cfg", {})
    name = config.get("architecture")
    return name if name is not None and timm.is_model(name) else None


def timm_options(encoder: nn.Module) -> dict[str, Any]:
    """What timm.create_model needs beside the name: a ViT only so takes the several sizes of image that the student takes."""
    return {
        "num_classes": 0,
        **({"dynamic_img_size": True} if getattr(encoder, "dynamic_img_size", False) else {}),
    }


def loader_file(config: StudentConfig, encoder: nn.Module) -> str | None:
    """Text of LOADER for a network that timm has only nearly; None for one that it has."""
    if config.network not in CHANGES:
        return None
    difference, lines = CHANGES[config.network]
    facts = {"architecture": architecture_of(encoder), "difference": difference, "lines": lines}
    return _LOADER.format(weights=WEIGHTS, num_features=encoder.num_features, **facts)


def timm_lines(config: StudentConfig, encoder: nn.Module, folder: Path | None = None) -> str:
    """What loads the encoder as `model` with timm, in the folder that was exported or, where `folder` is given, from anywhere."""
    if config.network in CHANGES:
        if folder is None:
            return f"from {LOADER.removesuffix('.py')} import load\nmodel = load()"
        return f'import runpy\nmodel = runpy.run_path({_quoted(folder / LOADER)})["load"]()'
    options = "".join(f", {name}={value}" for name, value in timm_options(encoder).items())
    weights = _quoted(WEIGHTS if folder is None else folder / WEIGHTS)
    return f"import timm\nmodel = timm.create_model({_quoted(architecture_of(encoder))}{options}, checkpoint_path={weights}).eval()"


def torchvision_lines(encoder: nn.Module) -> str:
    """What loads the encoder as `model` with torchvision."""
    return f"""import torch, torchvision
from safetensors.torch import load_file
model = torchvision.models.{architecture_of(encoder)}()
model.fc = torch.nn.Identity()
model.load_state_dict(load_file({_quoted(WEIGHTS)}))
model.eval()"""


def _quoted(text: object) -> str:
    return json.dumps(str(text))
