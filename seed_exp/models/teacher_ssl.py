"""How self-supervised methods name the tensors of their checkpoints, and loading by these names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_exp.base.registry import Registry, lookup
from seed_exp.models.heads import head_from_keys, head_layers
from seed_exp.models.weights import mismatch, with_counters


@dataclass(frozen=True)
class Convention:
    """Where a file keeps the encoder and the projection head, and which other keys it may have.

    Names are without the `module.` that DistributedDataParallel puts in front of them, once or
    several times.
    """

    container: tuple[str, ...]
    """Nested entries of the file around the tensors; a file may also be the innermost entry."""
    prefix: str
    """Prefix of the encoder's names; without it they are torchvision's."""
    head: str
    """Name of the head, after the prefix."""
    heads: tuple[str, ...]
    """Layers that the head of a file may have; the file's keys decide between them.

    "" = no head, or none that gives embeddings: the embedding is then the pooled feature.
    """
    ignored: tuple[str, ...] = ()
    """Beginnings of keys that are not the teacher's: momentum encoder, queue, prototypes, ..."""

    @property
    def head_prefix(self) -> str:
        """Prefix of the head's names."""
        return f"{self.prefix}{self.head}."


MLP = "Linear-ReLU-Linear"
MLP_BN = "Linear-BatchNorm1d-ReLU-Linear"
MLP_BN_BN = "Linear-BatchNorm1d-ReLU-Linear-BatchNorm1d"
_MOCO_IGNORED = ("encoder_k.", "queue")
_VISSL = ("classy_state_dict", "base_model", "model", "trunk")

_TEACHER_SSL: dict[str, Convention] = {
    "moco_v1": Convention(("state_dict",), "encoder_q.", "fc", ("Linear",), _MOCO_IGNORED),
    "moco_v2": Convention(("state_dict",), "encoder_q.", "fc", (MLP,), _MOCO_IGNORED),
    "moco_v3": Convention(
        ("state_dict",), "base_encoder.", "fc", (MLP_BN_BN,), ("momentum_encoder.", "predictor.")
    ),
    "simclr": Convention(("model",), "", "fc", (MLP_BN,)),
    "swav": Convention((), "", "projection_head", (MLP_BN, MLP), ("prototypes.",)),
    # No projection head, or one whose outputs are not compared by angle:
    "torchvision": Convention((), "", "head", ("",)),
    "dino": Convention(("teacher",), "backbone.", "head", ("",), ("head.",)),
    "barlow_twins": Convention(("model",), "backbone.", "head", ("",), ("projector.", "bn.")),
    "vissl": Convention(_VISSL, "_feature_blocks.", "head", ("",)),
}
TEACHER_SSL: Registry[Convention] = Registry("TEACHER_SSL", _TEACHER_SSL)


def load_weights(
    checkpoint: Mapping[str, Any], teacher_ssl: str, encoder: nn.Module, source: Path
) -> nn.Module:
    """Fills `encoder` from a checkpoint in the convention `teacher_ssl`; returns the head.

    Args:
        checkpoint: Result of `read_checkpoint`.
        teacher_ssl: Key of TEACHER_SSL.
        encoder: Network with torchvision's names; it may be on the meta device, because its tensors
            are replaced.
        source: The file, for the error.

    Returns:
        The projection head in the file; without layers if the convention has no head.

    Raises:
        ValueError: keys are missing or left over, or a shape differs; names the first of them and a
            convention that fits.
    """
    convention = lookup(TEACHER_SSL, teacher_ssl, "teacher_ssl")
    try:
        tensors, head = _match(checkpoint, convention, encoder)
    except ValueError as error:
        fitting = [name for name, other in TEACHER_SSL.items() if _fits(checkpoint, other, encoder)]
        advice = (
            f"teacher_ssl={fitting[0]} fits"
            if fitting
            else f"no other fits either ({', '.join(TEACHER_SSL)})"
        )
        raise ValueError(
            f"{source} does not fit teacher_ssl={teacher_ssl}: {error}; {advice}"
        ) from None
    for module, prefix in ((encoder, convention.prefix), (head, convention.head_prefix)):
        module.load_state_dict(
            {key: _float32(tensors[prefix + key]) for key in module.state_dict()}, assign=True
        )
    return head


def _match(
    checkpoint: Mapping[str, Any], convention: Convention, encoder: nn.Module
) -> tuple[dict[str, Tensor], nn.Module]:
    """The teacher's tensors by the file's keys, and a fitting head on the meta device.

    Raises:
        ValueError: the file does not follow the convention; says where.
    """
    named = {
        _unwrapped(str(key)): value
        for key, value in _contained(checkpoint, convention.container).items()
    }
    given = {key: value for key, value in named.items() if not key.startswith(convention.ignored)}
    head_keys = [
        key
        for key, value in given.items()
        if key.startswith(convention.head_prefix) and isinstance(value, Tensor)
    ]
    with torch.device("meta"):
        head = head_from_keys(
            {key.removeprefix(convention.head_prefix): given[key] for key in head_keys}
        )
    expected = {convention.prefix + key: tensor for key, tensor in encoder.state_dict().items()}
    expected |= {convention.head_prefix + key: tensor for key, tensor in head.state_dict().items()}
    given = with_counters(expected, given)
    if problem := mismatch(expected, given):
        raise ValueError(problem)
    if head_layers(head) not in convention.heads:
        found = f"is {head_layers(head)}" if head_keys else "is absent"
        expected_layers = " or ".join(layers or "none" for layers in convention.heads)
        raise ValueError(f"the head {convention.head_prefix}* {found}, expected {expected_layers}")
    return given, head


def _contained(checkpoint: Mapping[str, Any], container: tuple[str, ...]) -> Mapping[str, Any]:
    """The innermost of these nested entries; the checkpoint itself if the first entry is absent."""
    if not container or container[0] not in checkpoint:
        return checkpoint
    inside: Any = checkpoint
    for entry in container:
        if not isinstance(inside, Mapping) or entry not in inside:
            raise ValueError(f"no entry {'.'.join(container)}")
        inside = inside[entry]
    if not isinstance(inside, Mapping):
        raise ValueError(
            f"{'.'.join(container)} is a {type(inside).__name__}, expected a dictionary of tensors"
        )
    return inside


def _unwrapped(key: str) -> str:
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _fits(checkpoint: Mapping[str, Any], convention: Convention, encoder: nn.Module) -> bool:
    try:
        _match(checkpoint, convention, encoder)
    except ValueError:
        return False
    return True


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
