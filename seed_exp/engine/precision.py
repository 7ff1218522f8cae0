"""Which number format the forward pass uses."""

from __future__ import annotations

import torch

from seed_exp.config.schema import Precision


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Context for forward passes: bfloat16 where asked for, or on a GPU where `auto`."""
    bfloat16 = precision is Precision.bfloat16 or (precision is Precision.auto and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)
