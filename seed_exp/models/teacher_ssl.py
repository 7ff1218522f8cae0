"""How the self-supervised methods name the tensors of their checkpoints, and loading by these names without guessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_exp.base.registry import lookup
from seed_exp.models.heads import head_from_keys, head_layers
from seed_exp.models.weights import misfit, with_counters


@dataclass(frozen=True)
class Convention:
    """Where a file keeps the encoder and the projection head, and what it may hold besides.

    Names are without the `module.` that DistributedDataParallel puts in front of them, once or several times.
    """

    container: tuple[str, ...]
    """Entries of the file, one inside the other, under which the tensors lie; a file may also be what lies there."""
    prefix: str
    """What stands before the encoder's names, which are torchvision's."""
    head: str
    """Name of the head behind the prefix."""
    heads: tuple[str, ...]
    """The head's layers, as far as files of this convention have them; which of these, the keys decide.

    No layers ("") where there is no head or none that gives embeddings: the embedding is then the pooled feature.
    """
    ignored: tuple[str, ...] = ()
    """Beginnings of keys that are not the teacher's: momentum encoder, queue, prototypes, other heads."""

    @property
    def head_prefix(self) -> str:
        """What stands before the head's names."""
        return f"{self.prefix}{self.head}."


MLP = "Linear-ReLU-Linear"
MLP_BN = "Linear-BatchNorm1d-ReLU-Linear"
MLP_BN_BN = "Linear-BatchNorm1d-ReLU-Linear-BatchNorm1d"
_MOCO_IGNORED = ("encoder_k.", "queue")
_VISSL = ("classy_state_dict", "base_model", "model", "trunk")

TEACHER_SSL: dict[str, Convention] = {
    "moco_v1": Convention(("state_dict",), "encoder_q.", "fc", ("Linear",), _MOCO_IGNORED),
    "moco_v2": Convention(("state_dict",), "encoder_q.", "fc", (MLP,), _MOCO_IGNORED),
    "moco_v3": Convention(
        ("state_dict",), "base_encoder.", "fc", (MLP_BN_BN,), ("momentum_encoder.", "predictor.")
    ),
    "simclr": Convention(("model",), "", "fc", (MLP_BN,)),
    "swav": Convention((), "", "projection_head", (MLP_BN, MLP), ("prototypes.",)),
    # Without a projection head, or with one whose outputs are not compared by angle:
    "torchvision": Convention((), "", "head", ("",)),
    "dino": Convention(("teacher",), "backbone.", "head", ("",), ("head.",)),
    "barlow_twins": Convention(("model",), "backbone.", "head", ("",), ("projector.", "bn.")),
    "vissl": Convention(_VISSL, "_feature_blocks.", "head", ("",)),
}


def load_weights(
    checkpoint: Mapping[str, Any], teacher_ssl: str, encoder: nn.Module, source: Path
) -> nn.Module:
    """Fills `encoder` from a checkpoint in the convention `teacher_ssl`, and returns the projection head that the file holds.

    Args:
        checkpoint: What `read_checkpoint` gave.
        teacher_ssl: Key of TEACHER_SSL.
        encoder: Network with torchvision's names; it may lie on the meta device, as its tensors are replaced, not copied to.
        source: The file, for the error.

    Returns:
        The head, without layers where the convention has none.

    Raises:
        ValueError: keys are missing or left over, or a shape differs; names the first and the convention that would fit.
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
    """The teacher's tensors by the file's keys, and a head (meta device) that fits them; ValueError says what does not."""
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
    if problem := misfit(expected, given):
        raise ValueError(problem)
    if head_layers(head) not in convention.heads:
        found = f"is {head_layers(head)}" if head_keys else "is absent"
        expected_layers = " or ".join(layers or "none" for layers in convention.heads)
        raise ValueError(f"the head {convention.head_prefix}* {found}, expected {expected_layers}")
    return given, head


def _contained(checkpoint: Mapping[str, Any], container: tuple[str, ...]) -> Mapping[str, Any]:
    """What lies in the checkpoint under these entries; the checkpoint itself where the first of them is absent."""
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
