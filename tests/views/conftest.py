"""Real images for the tests of the views."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photographs(shared: Path) -> list[Image.Image]:
    rows = (shared / "data" / "imagenet_samples.tsv").read_bytes().splitlines()[:12]
    return [
        Image.open(io.BytesIO(base64.b64decode(row.split(b"\t")[2]))).convert("RGB") for row in rows
    ]
