"""Which number format the forward pass uses."""

from __future__ import annotations

import torch

from seed_exp.config.schema import Precision


def resolve(precision: Precision, device: torch.device) -> Precision:
    """What `auto` means on this device: bfloat16 on a GPU that computes in it (since Ampere), otherwise float32."""
    if precision is not Precision.auto:
        return precision
    # Not torch.cuda.is_bf16_supported(), which counts GPUs that only emulate it.
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return Precision.bfloat16 if has_bfloat16 else Precision.float32


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Context for forward passes."""
    enabled = resolve(precision, device) is Precision.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
