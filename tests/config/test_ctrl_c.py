"""Ctrl-C ends a command with one line, whenever it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HANGS = """
import pathlib, time
pathlib.Path({reached!r}).touch()
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("package", "arguments", "statuses"),
    [
        # While Python imports the command itself it ends by the signal, which shells show as 130.
        ("hydra", [], {-signal.SIGINT}),
        ("torch", ["run=x", "data=digits"], {130}),
    ],
)
def test_it_is_one_line_also_during_imports(
    package: str, arguments: list[str], statuses: set[int], tmp_path: Path
) -> None:
    reached = tmp_path / "reached"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(HANGS.format(reached=str(reached)))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, "-m", "seed_exp.embed", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        # Shells start jobs in the background with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not reached.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=100)
    finally:
        process.kill()
    assert said == "interrupted\n"
    assert process.returncode in statuses
