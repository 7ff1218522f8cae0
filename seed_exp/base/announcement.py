"""The run folder of a sweep's job, which only the job knows: it depends on the images."""

from __future__ import annotations

import json
import os
from pathlib import Path

from seed_exp.base.files import write_json

VARIABLE = "SEED_SWEEP_ANNOUNCEMENT"
"""Environment variable that names the file for it; unset outside of sweeps."""


def announce(run: Path) -> None:
    """Writes the run folder into the file that the sweep asks for; nothing outside of sweeps."""
    if file := os.environ.get(VARIABLE):
        write_json(Path(file), {"run": os.fspath(run)})


def announced(file: Path) -> Path | None:
    """The run folder that the job has written into the file; None as long as it has not."""
    return Path(json.loads(file.read_text())["run"]) if file.exists() else None
