"""Fixtures that tests of several rooms share."""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from seed_exp.base.stopping import WARNINGS, Stopped

# Tiny tensors gain nothing from a second thread, and threads that wait for each other on busy cores
# take ten times as long.
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported; for the processes that tests start, too

if TYPE_CHECKING:
    from ranks import Ranks


def pytest_configure(config: pytest.Config) -> None:
    """Makes SIGTERM end the run as Ctrl-C does: fixtures close what they opened.

    Workers of pytest-xdist keep the system's way: they end at once, and the main process with them.
    """
    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, _end)


def pytest_collection_finish() -> None:
    """Takes what all imports made out of garbage collection.

    Otherwise each `gc.collect` of a bench or of a library goes through a million objects.
    """
    gc.collect()
    gc.freeze()


def _end(number: int, _frame: object) -> None:
    pytest.exit(f"ended by {signal.Signals(number).name}", 128 + number)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[Any],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Ends the run where a signal came while the package itself handled signals.

    A test that signals its own process expects `Stopped`, and no report shows it.
    """
    report = yield
    if call.excinfo is not None and isinstance(call.excinfo.value, Stopped):
        pytest.exit(f"ended by {call.excinfo.value.signal_name}", call.excinfo.value.code)
    return report


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    """Fails a test after which a signal would no longer do to pytest what it did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *WARNINGS)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


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
    from ranks import Ranks  # here, because it imports torch

    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture
def exported_files_load_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that load exported files begin with their libraries imported, not this package."""
    import forks  # here, because most tests start no process

    from seed_exp.exporting import parity

    class Subprocess:
        run = staticmethod(functools.partial(forks.run, imported=forks.LIBRARIES))

    monkeypatch.setattr(parity, "subprocess", Subprocess)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for 4 MiB; only root can mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


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
