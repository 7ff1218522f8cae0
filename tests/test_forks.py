"""A line in a copy of a process that has imported all does what it does in a new process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest

SAYS = """
import os, sys
print(sys.argv, os.getcwd(), os.environ.get("WORD"), sys.path[0], __name__, sys.stdin.read())
print("said", file=sys.stderr)
import beside
sys.exit(int(sys.argv[-1]))
"""


@pytest.mark.parametrize("way", ["-m", "-c", "file"])
def test_a_line_says_the_same_and_ends_alike(way: str, tmp_path: Path) -> None:
    (tmp_path / "says.py").write_text(SAYS)
    (tmp_path / "beside.py").touch()
    (tmp_path / "asked").write_text("read")
    line = {"-m": ["-m", "says"], "-c": ["-c", SAYS], "file": [str(tmp_path / "says.py")]}[way]

    def done(run: Callable[..., subprocess.CompletedProcess[Any]]) -> tuple[int, str, str]:
        with (tmp_path / "asked").open() as asked:
            found = run(
                [sys.executable, *line, "a b", "7"],
                cwd=tmp_path,
                env={"WORD": "x", "PATH": "/bin"},
                stdin=asked,
                capture_output=True,
                text=True,
            )
        return found.returncode, found.stdout, found.stderr

    found = done(forks.run)
    assert found == done(subprocess.run)
    assert found[0] == 7


def test_it_is_a_process_that_can_be_stopped_killed_and_waited_for() -> None:
    code = "import time; print('runs', flush=True); time.sleep(60)"
    with forks.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    assert process.poll() == -signal.SIGTERM
