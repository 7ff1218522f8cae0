"""Whether an exported file gives the features of the network that it was made of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT = 1e-4
"""Largest relative error of an exported file: float32 rounding stays below a tenth of it, the wrong network is far above."""

_BEFORE = """import sys
sys.modules["seed_exp"] = None  # what is exported must not need it
from safetensors.torch import load_file, save_file
images = load_file(sys.argv[1] + "/images.safetensors")["images"]
import torch
torch.set_grad_enabled(False)
"""
_AFTER = """
results = {name: torch.as_tensor(value).contiguous() for name, value in (("features", features), ("embeddings", embeddings))}
save_file(results, sys.argv[1] + "/results.safetensors")
"""


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Largest |given - expected| over the largest difference of `expected` [N, D] from its mean over the images.

    Not over its magnitude: what all images have in common must not hide an error in what tells them apart. Infinite where
    shapes differ or a number is not finite.
    """
    if given.shape != expected.shape or not given.isfinite().all():
        return float("inf")
    spread = (expected - expected.mean(0)).abs().max()
    scale = spread if spread > 0 else expected.abs().max().clamp_min(1e-30)
    return float((given - expected).abs().max() / scale)


def results_of(lines: str, images: Tensor, folder: Path) -> dict[str, Tensor]:
    """What `lines` make of `images` in a fresh Python that starts in `folder` and cannot import this package.

    Args:
        lines: Python that turns `images` into `features` and, where `embeddings` are wanted, into these too.
        images: Normalised images [N, 3, S, S].
        folder: Where the files are that the lines name.

    Returns:
        By the name of the variable.

    Raises:
        ValueError: the lines fail; with the last line of what they printed.
    """
    with TemporaryDirectory() as exchange:
        save_file({"images": images.contiguous()}, Path(exchange) / "images.safetensors")
        program = f"{_BEFORE}embeddings = torch.empty(0)\n{lines}{_AFTER}"
        done = subprocess.run(
            [sys.executable, "-B", "-c", program, exchange],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ValueError(f"what was exported cannot be loaded: {reason}")
        return dict(load_file(Path(exchange) / "results.safetensors"))
