"""Meets a hardship of the system, in a process of its own.

    python hardship.py memory FOLDER        reads the files in FOLDER with little memory to spare,
                                            then with enough
    python hardship.py permission FOLDER    trains in FOLDER, and loses the permission to write
                                            checkpoints from step 4 to the end
    python hardship.py full FOLDER          trains in FOLDER as one of several processes, and fills
                                            its disk at the end

Prints a line for each outcome.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from disks import fill

from seed_exp.engine import checkpoint, distributed
from seed_exp.engine.checkpoint import load_checkpoint
from seed_exp.models.weights import read_checkpoint


def memory(folder: Path) -> None:
    for spare in (10, 80, 2000):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + spare * 2**20, resource.RLIM_INFINITY))
        outcome(f"{spare} MiB, run", lambda: load_checkpoint(folder))
        for path in sorted(folder.glob("weights*")):
            outcome(f"{spare} MiB, {path.name}", lambda path=path: read_checkpoint(path))


def outcome(name: str, work: Callable[[], Any]) -> None:
    try:
        work()
        print(f"{name}: done")
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")


def permission(folder: Path) -> None:
    def lose(trained: dict[str, int], *_: Any) -> None:
        if trained["a"] == 4:
            (folder / "checkpoints").chmod(0o500)

    def regain(_: Any) -> dict[str, float]:
        evaluations.append(1)
        if len(evaluations) == 3:  # the one at the end
            (folder / "checkpoints").chmod(0o700)
        return {"a/norm": 1.0}

    evaluations: list[int] = []
    tiny.train(tiny.seed(["a"]), folder, evaluate=regain, on_checkpoint=lose)


def full(folder: Path) -> None:
    """In one of two processes: finds the disk full at the last step, and for good."""

    def evaluate(_: Any) -> dict[str, float]:
        evaluations.append(1)
        if len(evaluations) == 3 and distributed.rank() == 0:
            time.sleep(0.5)  # the checkpoint before the evaluation is being written
            fill(folder.parent)
        return {}

    evaluations: list[int] = []
    checkpoint.PAUSE_S = 0.1
    with distributed.process_group(torch.device("cpu")):
        tiny.train(tiny.seed(["a"]), folder, evaluate=evaluate)
        with distributed.rank0_first():  # as what follows a training does
            pass
        print("done")


if __name__ == "__main__":
    name, place = sys.argv[1:]
    {"memory": memory, "permission": permission, "full": full}[name](Path(place))
