"""Number format of the forward pass."""

from __future__ import annotations

import torch

from seed_exp.config.schema import Precision


def resolve(precision: Precision, device: torch.device) -> Precision:
    """The format that `precision` stands for on this device.

    `auto` is bfloat16 on a GPU that computes in it (since Ampere), otherwise float32. On a CPU
    networks of a training may have formats of their own: `Method.formats`.
    """
    if precision is not Precision.auto:
        return precision
    if device.type != "cuda":
        return Precision.float32
    # Not torch.cuda.is_bf16_supported(), which counts GPUs that only emulate it. Where there is no
    # GPU, one is planned for.
    is_older = torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    return Precision.float32 if is_older else Precision.bfloat16


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """The format of `resolve` as torch has it."""
    is_half = resolve(precision, device) is Precision.bfloat16
    return torch.bfloat16 if is_half else torch.float32


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Context for forward passes."""
    enabled = dtype_of(precision, device) is torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
