"""Bytes from outside may not make us take memory that they do not have."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

LIMIT_KIB = 1 << 20


@pytest.fixture(autouse=True)
def _modest_memory() -> Iterator[None]:
    """Fails the test if the process grew by more than a GiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LIMIT_KIB
