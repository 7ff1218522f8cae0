"""Comparison of an exported file's output with that of the network it was made from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT = 1e-4
"""Largest relative error allowed.

Rounding of float32 stays below a tenth of it, and a wrong network is far above it.
"""

_BEFORE = """import sys
sys.modules["seed_exp"] = None  # an exported file must not need this package
from safetensors.torch import load_file, save_file
images = load_file(sys.argv[1] + "/images.safetensors")["images"]
import torch
torch.set_grad_enabled(False)
"""
_AFTER = """
results = {"features": features, "embeddings": embeddings, "maps": maps}
results = {name: torch.as_tensor(value).clone().contiguous() for name, value in results.items()}
save_file(results, sys.argv[1] + "/results.safetensors")
"""


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Largest |given - expected|, divided by the largest |expected - its mean over the images|.

    The divisor is not the largest |expected|: a large part that all images share must not hide an
    error in the part that tells images apart.

    Args:
        given: Output of the exported file [N, ...].
        expected: Output of the network [N, ...].

    Returns:
        Error >= 0; infinite if shapes differ or a number is not finite.
    """
    if given.shape != expected.shape or not given.isfinite().all():
        return float("inf")
    spread = (expected - expected.mean(0)).abs().max()
    scale = spread if spread > 0 else expected.abs().max().clamp_min(1e-30)
    return float((given - expected).abs().max() / scale)


def results_of(lines: str, images: Tensor, folder: Path) -> dict[str, Tensor]:
    """Runs `lines` on `images` in a new Python process that cannot import this package.

    Args:
        lines: Python that turns `images` into `features` and, if these are wanted, `embeddings`
            and `maps`.
        images: Normalised images [N, 3, S, S].
        folder: Folder in which the process starts; it has the files that the lines name.

    Returns:
        Values of the variables `features`, `embeddings` and `maps`, by name.

    Raises:
        ValueError: the lines fail. The message has the last line that they wrote to stderr.
    """
    with TemporaryDirectory() as exchange:
        save_file({"images": images.contiguous()}, Path(exchange) / "images.safetensors")
        program = f"{_BEFORE}embeddings = maps = torch.empty(0)\n{lines}{_AFTER}"
        done = subprocess.run(
            [sys.executable, "-B", "-c", program, exchange],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ValueError(f"the exported files cannot be loaded: {reason}")
        return dict(load_file(Path(exchange) / "results.safetensors"))
