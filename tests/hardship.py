"""Meets a hardship of the system, in a process of its own.

    python hardship.py memory FOLDER        reads the files in FOLDER with little memory to spare,
                                            then with enough
    python hardship.py permission FOLDER    trains in FOLDER, and loses the permission to write
                                            checkpoints from step 4 to the end
    python hardship.py kill FILE            is killed while it writes FILE

Prints a line for each outcome.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny

from seed_exp.base.files import atomic_write
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


def kill(file: Path) -> None:
    with atomic_write(file) as output:
        output.write(bytes(1 << 16))
        output.flush()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    name, place = sys.argv[1:]
    {"memory": memory, "permission": permission, "kill": kill}[name](Path(place))
