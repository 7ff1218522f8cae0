"""Bytes from outside may not make us take memory that they do not have."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
from PIL import Image

LIMIT_KIB = 1 << 20


@pytest.fixture(autouse=True)
def _modest_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test if the process grew by more than a GiB."""
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 1 << 24
    )  # what is damaged may well be a header, and 180 million take 2 GiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LIMIT_KIB
