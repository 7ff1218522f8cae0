"""SIGKILL at random instants, checkpoint writing included.

The run that is started again ends as if nothing had happened.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from pathlib import Path

import forks
import kill_me
import pytest
import tiny

KILLS = 5
"""Kills of each variant: 40 in all."""


def start(folder: Path, variant: str, seconds: str | float) -> list[int]:
    """Trains in a process, or two; returns their exit statuses."""
    ranks = 2 if variant.endswith("two processes") else 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        rendezvous = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        paths = os.pathsep.join(
            [str(Path(kill_me.__file__).parent), os.environ.get("PYTHONPATH", "")]
        )
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "2",
            **{key: str(value) for key, value in rendezvous.items()},
        }
        # The last rank is the one that is killed: the other must notice and end by itself.
        mine = seconds if rank == ranks - 1 else "never"
        command = [sys.executable, kill_me.__file__, str(folder), variant, str(mine)]
        processes.append(forks.Popen(command, env=environment))
    try:
        return [process.wait(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("variant", kill_me.VARIANTS)
def test_runs_killed_at_random_instants_end_bit_for_bit_as_undisturbed_ones(
    variant: str, tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for folder in (straight, broken):
        folder.mkdir()
    assert set(start(straight, variant, "never")) == {0}
    dice, kills = random.Random(variant), 0
    while kills < KILLS:
        statuses = start(broken, variant, dice.uniform(0.0, 1.5))
        assert statuses[-1] in (0, -9)
        kills += statuses[-1] == -9
        if (
            statuses[-1] == 0
        ):  # it was through before it was killed: from the beginning, with what was left
            for path in (broken / "checkpoints").iterdir():
                path.unlink()
    assert set(start(broken, variant, "never")) == {0}
    tiny.assert_same(tiny.last_checkpoint(straight), tiny.last_checkpoint(broken))
    for name in ("metrics.jsonl", "students.pt"):
        assert (straight / name).read_bytes() == (broken / name).read_bytes()
