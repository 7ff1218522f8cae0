"""A run of these tests ends when it is asked to, whatever it is doing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LONG = """
import time
from pathlib import Path

import pytest

from seed_exp.base.stopping import stop_at_once
from seed_exp.cluster import local


@pytest.fixture
def opened():
    yield
    Path("closed").touch()


def test_cells(tmp_path):
    (tmp_path / "logs").mkdir()
    local.run_cells(tmp_path / "absent.sh", "job", 1, 1, 0)


def test_waits(opened):
    Path("waits").touch()
    time.sleep(60)


def test_waits_in_a_command(opened):
    with stop_at_once():
        Path("waits").touch()
        time.sleep(60)


def test_after():
    Path("after").touch()
"""


@pytest.mark.parametrize(
    ("workers", "test"),
    [("0", "test_waits"), ("0", "test_waits_in_a_command"), ("1", "test_waits_in_a_command")],
)
def test_sigterm_ends_a_run_of_tests(workers: str, test: str, tmp_path: Path) -> None:
    (tmp_path / "test_long.py").write_text(LONG)
    names = [f"test_long.py::{name}" for name in ("test_cells", test, "test_after")]
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-n", workers, *names]
    path = os.pathsep.join((str(HERE), str(HERE.parent)))
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("PYTEST_")}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "waits").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=40)
        finally:
            process.kill()
    assert process.returncode != 0
    assert "ended by SIGTERM" in printed
    (closing,) = re.findall(r"=+ (\d+ .*) in [\d.]+s", printed)
    assert re.fullmatch(r"1 passed(, \d+ warnings?)?", closing)  # no error of a fixture
    assert not (tmp_path / "after").exists()
    assert workers != "0" or (tmp_path / "closed").exists()
