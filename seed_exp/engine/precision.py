"""Which number format the forward pass uses."""

from __future__ import annotations

import torch

from seed_exp.config.schema import Precision


def resolve(precision: Precision, device: torch.device) -> Precision:
    """What `auto` means on this device: bfloat16 on a GPU, float32 on the CPU."""
    if precision is not Precision.auto:
        return precision
    return Precision.bfloat16 if device.type == "cuda" else Precision.float32


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Context for forward passes."""
    enabled = resolve(precision, device) is Precision.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
