"""What several rooms' tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference fixtures and small real images that may stand beside the checkout."""
    folder = Path(os.environ.get("SEED_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "fixtures").is_dir():
        pytest.skip(f"no reference data at {folder}; set SEED_SHARED to the folder that holds fixtures/ and data/")
    return folder
