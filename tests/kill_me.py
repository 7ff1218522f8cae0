"""Trains something tiny in a process that kills itself after a while, or at a certain point.

    python kill_me.py FOLDER VARIANT SECONDS
    python kill_me.py at MODULE:NAME COMMAND OPTION=VALUE ...

SECONDS counts from the moment when training starts; `never` lets it end. Ranks and their number
come from the environment. The second form runs a command of the package, and kills it when it
calls the function NAME of MODULE.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch

from seed_exp.base.files import atomic_write
from seed_exp.config.compose import compose
from seed_exp.engine import distributed
from seed_exp.engine.method import Method

PATIENT: dict[str, Any] = {
    "optimizer": tiny.optimizer_config(name="adamw", lr=0.01),
    "ema_decay": 0.8,
    "mixup": True,
}
VARIANTS: dict[str, tuple[Callable[[], Method], int]] = {
    "single": (lambda: tiny.seed(["a"], dropout=0.3), 1),
    "fleet": (lambda: tiny.seed(["a", "b", "c"], dropout=0.3), 1),
    "accumulation": (lambda: tiny.seed(["a", "b"], dropout=0.3), 4),
    "moco": (lambda: tiny.moco(["a"], dropout=0.3), 1),
    "linear": (tiny.probe, 1),
    "two processes": (lambda: tiny.seed(["a", "b"], dropout=0.3), 2),
    "patient": (lambda: tiny.seed(["a", "b"], dropout=0.3), 2),
    "patient, two processes": (lambda: tiny.seed(["a"], dropout=0.3), 1),
}


def kill_at(point: str, command: str, options: list[str]) -> None:
    """Runs a command until it calls a function."""
    module, _, name = point.partition(":")
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    assert callable(getattr(owner, name))
    setattr(owner, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    run = getattr(importlib.import_module(f"seed_exp.{command}"), command)
    run(compose(command, options))


def main() -> None:
    if sys.argv[1] == "at":
        kill_at(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    folder, variant, seconds = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    build, accumulation = VARIANTS[variant]

    def students(
        steps: object, networks: dict[str, dict[str, torch.Tensor]], batch_size: int
    ) -> None:
        with atomic_write(folder / "students.pt") as file:
            torch.save(networks, file)

    with distributed.process_group(torch.device("cpu")):
        if seconds != "never":
            threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
        config = tiny.fit_config(
            steps=60, accumulation=accumulation, checkpoint_every=1, eval_every=0.8
        )
        options = PATIENT if variant.startswith("patient") else {}
        tiny.train(build(), folder, config, num_workers=1, on_checkpoint=students, **options)


if __name__ == "__main__":
    main()
