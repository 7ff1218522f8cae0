"""Without SLURM, a process of its own runs the cells, as many at a time as asked for.

It is known whether that process is alive.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from seed_exp.cluster import local
from seed_exp.cluster.sweep_cells import Attempt, State

SCRIPT = """\
trap 'stop=1' TERM
echo "CUDA $CUDA_VISIBLE_DEVICES"; echo "begins $1" >>{folder}/order
for ((i = 0; i < {tenths} && ! stop; i++)); do sleep 0.1; done
echo "ends $1" >>{folder}/order
echo "$((stop ? 75 : 0)) 0 here" >{folder}/logs/${{SWEEP_JOB}}_$1.exit
"""


def write_script(folder: Path, tenths: int) -> Path:
    (folder / "logs").mkdir()
    script = folder / "001.sh"
    script.write_text(SCRIPT.format(folder=folder, tenths=tenths))
    return script


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().splitlines() if (folder / "order").exists() else []


def states(folder: Path, job: str, num: int) -> list[State | None]:
    attempts = [Attempt(f"{job}_{number}", "logs", "", "") for number in range(num)]
    found = local.active(folder, attempts)
    return [found[attempt.job].state if attempt.job in found else None for attempt in attempts]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def most_at_once(lines: list[str]) -> int:
    counts = [
        sum(1 if line.startswith("begins") else -1 for line in lines[: number + 1])
        for number in range(len(lines))
    ]
    return max(counts)


@pytest.mark.parametrize("parallel", [1, 2])
def test_cells_run_in_their_order_and_no_more_at_once_than_asked(
    tmp_path: Path, parallel: int
) -> None:
    script = write_script(tmp_path, 3)
    local.run_cells(script, "local-a", 4, parallel, 0)
    begun = [line for line in order(tmp_path) if line.startswith("begins")]
    assert sorted(begun) == [f"begins {number}" for number in range(4)]
    assert parallel > 1 or begun == sorted(begun)
    assert most_at_once(order(tmp_path)) == parallel


def test_cells_side_by_side_have_gpus_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    local.run_cells(write_script(tmp_path, 5), "local-a", 2, 2, 2)
    assert [(tmp_path / f"logs/local-a_{number}.log").read_text() for number in (0, 1)] == [
        "CUDA 3,5\n",
        "CUDA 6,7\n",
    ]


def test_it_outlives_who_started_it_and_its_states_can_be_told(tmp_path: Path) -> None:
    script = write_script(tmp_path, 600)
    call = f"local.start(Path({str(script)!r}), 'local-a', num_cells=3, parallel=1, gpus=0)"
    code = f"from pathlib import Path\nfrom seed_exp.cluster import local\n{call}"
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60
    )  # it has ended, and with it its terminal
    wait_until(lambda: order(tmp_path) == ["begins 0"])
    assert states(tmp_path, "local-a", 3) == [State.RUNNING, State.PENDING, State.PENDING]
    (tmp_path / "logs/local-a_1.cancel").touch()  # one that waits, then the one that runs
    assert states(tmp_path, "local-a", 3) == [State.RUNNING, None, State.PENDING]
    (tmp_path / "logs/local-a_0.cancel").touch()
    wait_until(lambda: order(tmp_path) == ["begins 0", "ends 0", "begins 2"])
    assert (tmp_path / "logs/local-a_0.exit").read_text() == "75 0 here\n"
    assert states(tmp_path, "local-a", 3) == [None, None, State.RUNNING]
    (tmp_path / "logs/local-a_2.cancel").touch()
    wait_until(lambda: states(tmp_path, "local-a", 3) == [None] * 3)


KILLED_AT_ONCE = """
import os, signal, sys, time
from seed_exp.cluster import local
start = local._start_cell
def _start_cell(script, *arguments):
    cell = start(script, *arguments)
    while not (script.parent / "order").exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)
    return cell
local._start_cell = _start_cell
local._main()
"""
"""The process that runs the cells; SIGTERM comes when the first one has only just begun."""


def test_one_that_was_killed_runs_nothing_any_more(tmp_path: Path) -> None:
    script = write_script(tmp_path, 600)
    arguments = [str(script), "local-a", "2", "1", "0"]
    done = subprocess.run([sys.executable, "-c", KILLED_AT_ONCE, *arguments], timeout=120)
    assert done.returncode == 128 + signal.SIGTERM  # its cells got their time for a checkpoint
    assert states(tmp_path, "local-a", 2) == [None, None]
    assert (tmp_path / "logs/local-a_0.exit").read_text() == "75 0 here\n"
    assert order(tmp_path) == ["begins 0", "ends 0"]


def test_one_that_does_not_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="did not start"):
        local.start(write_script(tmp_path, 1), "local-a", num_cells=1, parallel=1, gpus=0)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["local-a.log"]
