"""Checkpoints of a run: written whole or not at all, the newest readable one is where the run goes on."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from seed_exp.engine import distributed
from seed_exp.files import atomic_write

log = logging.getLogger("seed_exp")

_DAMAGE = (OSError, RuntimeError, EOFError, ValueError, LookupError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
"""What reading a damaged file raises."""

KEEP = 2
"""Checkpoints kept: the newest, and the one before in case the newest is damaged."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Writes checkpoints/step_<step>.pt in the run folder and removes all but the newest KEEP; rank 0 only.

    Args:
        folder: Run folder.
        step: Steps done.
        state: Tensors, numbers, strings in dicts and lists.
    """
    if distributed.rank() != 0:
        return
    with atomic_write(folder / "checkpoints" / f"step_{step:08d}.pt") as file:
        torch.save(state, file)
    for path in _checkpoints(folder)[KEEP:]:
        path.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint of the run that can be read, with tensors on the CPU; None if there is none.

    Raises:
        ValueError: there are checkpoints, and none of them can be read.
    """
    paths = _checkpoints(folder)
    for path in paths:
        try:
            return _read(path)
        except _DAMAGE as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before", path, str(error).partition("\n")[0])
    if paths:
        raise ValueError(f"none of the checkpoints in {folder / 'checkpoints'} can be read; remove them to start anew")
    return None


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums: it would read zeroed blocks as weights
        if (wrong := archive.testzip()) is not None:
            raise ValueError(f"checksum of {wrong} differs")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    files = (folder / "checkpoints").glob("step_*.pt")
    steps = {path: int(match[1]) for path in files if (match := re.fullmatch(r"step_(\d{8,})\.pt", path.name))}
    return sorted(steps, key=steps.__getitem__, reverse=True)
