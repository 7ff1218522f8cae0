"""Tests on a real SLURM of their own; each file begins with `pytestmark = pytest.mark.slurm`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from private_slurm import PrivateSlurm, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[PrivateSlurm]:
    """Two nodes of four CPUs and two GPUs each; none of it need be there."""
    if (reason := why_not()) is not None:
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder,
        PrivateSlurm(Path(folder)) as running,
    ):
        yield running


@pytest.fixture
def slurm(cluster: PrivateSlurm) -> Iterator[PrivateSlurm]:
    """The cluster, with no jobs of another test."""
    yield cluster
    cluster.cancel_all()
