"""Stands for wandb in the process that sends.

Writes down what it is asked to do, and misbehaves as WANDB_FAKE says.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


class UsageError(Exception):
    """Raised when nobody is logged in."""


errors = SimpleNamespace(UsageError=UsageError)
Settings = SimpleNamespace
sys.modules["wandb.proto"] = SimpleNamespace(wandb_internal_pb2=SimpleNamespace(Record=None))  # type: ignore[assignment]


def call(name: str, /, **facts: Any) -> None:
    """WANDB_FAKE is "<name> hangs" or "<name> fails", and maybe " online"."""
    with Path(os.environ["WANDB_FAKE_CALLS"]).open("a") as file:
        file.write(json.dumps({"call": name, **facts}, default=vars) + "\n")
    bad, _, how = (
        os.environ.get("WANDB_FAKE", "")
        .removesuffix(" online" if facts.get("mode") is None else "")
        .partition(" ")
    )
    if (bad, how) == (name, "hangs"):
        time.sleep(1000)
    if (bad, how) == (name, "fails"):
        raise RuntimeError("no way\nat all")


class Run:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.id, self.url, self.offline = (
            arguments["id"],
            f"https://host/{arguments['id']}",
            arguments["mode"] == "offline",
        )
        self.starting_step = int(os.environ.get("WANDB_FAKE_STEP", "0"))

    def log(self, row: dict[str, Any], step: int) -> None:
        call("log", id=self.id, row=row, step=step)

    def log_artifact(self, artifact: Artifact) -> None:
        call("log_artifact", id=self.id, name=artifact.name, content=artifact.content)

    def mark_preempting(self) -> None:
        call("mark_preempting", id=self.id)

    def finish(self, exit_code: int) -> None:
        call("finish", id=self.id, exit_code=exit_code)


class Artifact:
    def __init__(self, name: str, type: str) -> None:
        self.name = name

    def add_file(self, path: str) -> None:
        self.content = Path(path).read_text()


def init(**arguments: Any) -> Run:
    call("init", **arguments)
    return Run(arguments)


def teardown(exit_code: int) -> None:
    call("teardown")
