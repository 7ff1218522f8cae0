"""Lines of Python that load an exported encoder without this package.

They are meant to be pasted; `export` runs them itself before it prints them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from torch import nn

from seed_exp.config.schema import StudentConfig
from seed_exp.config.schema.networks import is_place

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
"""Networks that timm and torchvision have under the same name, with the same names of tensors.

The classifier `fc` is the exception, which an exported encoder does not have.
"""

CHANGES: dict[str, tuple[str, str]] = {
    "efficientnet_b1": (
        "one strided convolution padded as for images of 240 px, whatever their size",
        """    block = model.blocks[5][0]
    channels, weight = block.conv_dw.groups, block.conv_dw.weight
    options = {"stride": 2, "padding": 2, "groups": channels, "bias": False}
    block.conv_dw = nn.Conv2d(channels, channels, 5, **options)
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
"""Students from which timm's network of the same name differs: the difference, and the lines of
Python that turn timm's network `model` into the student's.
"""

_LOADER = '''"""The encoder of this folder: timm's {architecture} with {difference}.

timm's own network takes the same weights without an error, but gives other features.
Needs torch, timm and safetensors.
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


def architecture_of(config: StudentConfig, encoder: nn.Module) -> str | None:
    """Name of the network in timm; None for one that timm does not have.

    A custom network has none, even if its factory makes one of timm's: it may change it.
    """
    known: dict[str, Any] = getattr(encoder, "pretrained_cfg", {})
    name = None if is_place(config.network) else known.get("architecture")
    return name if name is not None and timm.is_model(name) else None


def timm_options(config: StudentConfig, encoder: nn.Module) -> dict[str, Any]:
    """Arguments of timm.create_model besides the name: those of the student.

    A ViT needs one to take images of several sizes, as the student does.
    """
    return {
        "num_classes": 0,
        **({"dynamic_img_size": True} if getattr(encoder, "dynamic_img_size", False) else {}),
        **config.args,
    }


def loader_file(config: StudentConfig, encoder: nn.Module) -> str | None:
    """Text of the file LOADER for a network in CHANGES; None for any other."""
    if config.network not in CHANGES:
        return None
    difference, lines = CHANGES[config.network]
    facts = {
        "architecture": architecture_of(config, encoder),
        "difference": difference,
        "lines": lines,
    }
    return _LOADER.format(weights=WEIGHTS, num_features=encoder.num_features, **facts)


def timm_lines(config: StudentConfig, encoder: nn.Module, folder: Path | None = None) -> str:
    """Lines of Python that load the encoder with timm, as `model`.

    Args:
        config: Options of the student.
        encoder: The student's encoder.
        folder: The exported folder, for lines that work anywhere; None = for lines that work only
            inside it.
    """
    if config.network in CHANGES:
        if folder is None:
            return f"from {LOADER.removesuffix('.py')} import load\nmodel = load()"
        return f'import runpy\nmodel = runpy.run_path({_quoted(folder / LOADER)})["load"]()'
    options = "".join(f", {key}={value!r}" for key, value in timm_options(config, encoder).items())
    weights = _quoted(WEIGHTS if folder is None else folder / WEIGHTS)
    arguments = f"{_quoted(architecture_of(config, encoder))}{options}, checkpoint_path={weights}"
    return f"import timm\nmodel = timm.create_model({arguments}).eval()"


def torchvision_lines(architecture: str | None) -> str:
    """Lines of Python that load an encoder of IN_TORCHVISION with torchvision, as `model`."""
    return f"""import torch, torchvision
from safetensors.torch import load_file
model = torchvision.models.{architecture}()
model.fc = torch.nn.Identity()
model.load_state_dict(load_file({_quoted(WEIGHTS)}))
model.eval()"""


def _quoted(text: object) -> str:
    return json.dumps(str(text))
