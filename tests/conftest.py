"""Fixtures that tests of several rooms share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Tiny tensors gain nothing from a second thread, and threads that wait for each other on busy cores
# take ten times as long.
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported; for the processes that tests start, too

from ranks import Ranks


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference fixtures and small real images that may stand beside the checkout."""
    folder = Path(os.environ.get("SEED_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "fixtures").is_dir():
        pytest.skip(
            f"no reference data at {folder}; "
            "set SEED_SHARED to the folder that holds fixtures/ and data/"
        )
    return folder


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes in one gloo group."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Log lines of the package during the test, whatever `log_to` did to its logger before."""
    lines: list[str] = []
    log = logging.getLogger("seed_exp")
    before = (log.level, log.propagate, list(log.handlers))
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield lines
    log.setLevel(before[0])
    log.propagate = before[1]
    log.handlers[:] = before[2]
