"""Sends what a run logs to Weights & Biases, as `engine.follower` says.

Called as `python -m seed_exp.engine.wandb_process FOLDER auto|offline`.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb

from seed_exp.base.redaction import redact
from seed_exp.base.stopping import REQUEUE_STATUS
from seed_exp.engine.follower import (
    StudentRun,
    Trainer,
    follow,
    ignore_signals,
    reason_of,
    run_folder,
    sole_sender,
)

INIT_TIMEOUT_S = 30
"""Seconds that the server may take to answer at first; after that the run is written offline."""
FLUSH_S = 5
"""Seconds after the end of an offline run in which W&B may still write its file."""
GRACE_S = 3
"""Seconds that the server may still take to answer when the training has ended."""


class WandbTrainer(Trainer):
    """The connection to the process that trains, from a process that may go offline."""

    def __init__(self, status: int | None) -> None:
        self.server_answered = threading.Event()
        self._leaving = threading.Lock()
        super().__init__(status)

    def hurry(self) -> None:
        """Goes offline if the server has not answered until now."""
        if not self.server_answered.wait(GRACE_S):
            self.go_offline(logging.WARNING, "the server has not answered yet")

    def go_offline(self, level: int, reason: str) -> None:
        """Runs this program anew, offline: wandb cannot forget a run that failed to begin."""
        self._leaving.acquire()  # for ever: of two threads that want it the first one does it
        self.show_line(level, f"{reason.rstrip('.')}; this run goes on offline")
        teardown = threading.Thread(target=_teardown, daemon=True)
        teardown.start()
        teardown.join(2)  # it may hang as well
        os.dup2(self._pipe, 1)
        status = [] if self.status is None else [str(self.status)]
        os.execv(sys.executable, [*sys.orig_argv[: -len(sys.argv[2:])], "offline", *status])


class WandbRun(StudentRun):
    """A student's run at W&B.

    Args:
        student, about, folder, training: As for all services.
        offline: Whether the run is written to disk, for `wandb sync`.
        stats: Whether the load of GPU, memory and so on is recorded with this run.
    """

    def __init__(
        self,
        student: str,
        about: Mapping[str, Any],
        folder: Path,
        training: WandbTrainer,
        *,
        offline: bool,
        stats: bool,
    ) -> None:
        super().__init__(student, about, folder, training)
        self._offline, self._server_answered, self._stats = offline, training.server_answered, stats
        self._run: Any = None
        if offline:
            self.delivered = last_step(folder, self.id)

    def begin(self) -> int:
        """Begins the run, or goes on with it; returns the last step that W&B has."""
        about = self.about
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,  # the address of a repository and a diff may hold secrets
            disable_code=True,
            init_timeout=INIT_TIMEOUT_S,
            x_disable_stats=not self._stats,
            x_disable_meta=is_secret(self.folder),
            x_stats_pid=self.training.pid,
        )
        self._run = wandb.init(
            project=about["project"],
            entity=about["entity"],
            group=about["group"],
            job_type=about["job_type"],
            tags=about["tags"],
            name=about["names"][self.student],
            id=self.id,
            config={"student": self.student, **about["config"]},
            resume="allow",
            reinit="create_new",  # beside those of the other students
            dir=str(self.folder),
            mode="offline" if self._offline else None,  # None: online, or as WANDB_MODE says
            settings=settings,
        )
        self._server_answered.set()
        if self._run.offline:  # as asked for here, or by WANDB_MODE
            return last_step(self.folder, self.id)
        self.training.show_line(logging.INFO, f"{self.student}: {self._run.url}")
        return int(self._run.starting_step) - 1

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends numbers, pictures and tables."""
        self._run.log(
            {
                key: self._media(value) if isinstance(value, dict) else value
                for key, value in row.items()
            },
            step=step,
        )

    def write_weights(self, path: Path) -> None:
        """Sends the student's file as an artifact."""
        artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def end(self, status: int) -> None:
        """Ends the run with the exit status of the training."""
        if status == REQUEUE_STATUS:
            self._run.mark_preempting()
        self._run.finish(exit_code=status)

    def is_torn(self) -> bool:
        """Whether a full disk has cut off what was written for W&B on this machine.

        Asked after `finish`, which on a busy machine returns before W&B's own process has written
        the last lines: only what is missing after FLUSH_S is lost.
        """
        deadline = time.monotonic() + FLUSH_S
        while last_step(self.folder, self.id) < self.delivered:
            if time.monotonic() > deadline:
                return True
            time.sleep(0.1)
        return False

    def _media(self, entry: Mapping[str, Any]) -> Any:
        if "picture" in entry:
            return wandb.Image(str(self.picture(entry)))
        return wandb.Table(columns=entry["columns"], data=entry["rows"])


def is_secret(folder: Path) -> bool:
    """Whether the path has a secret in it; W&B would record it with the facts about the machine."""
    path = str(folder.absolute())
    return redact(path) != path


def last_step(folder: Path, run_id: str) -> int:
    """The last step that was written for W&B on this machine, in any earlier process; -1 = none."""
    from wandb.proto import wandb_internal_pb2

    record_type: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined,unused-ignore]
    steps = [-1]
    for path in folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb"):
        for content in _records(path.read_bytes()):
            record = record_type.FromString(content)
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
    return max(steps)


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file up to where it was torn.

    It has the format of LevelDB's log: 32 KiB blocks of records, which may be in several pieces.
    """
    position, whole = 7, b""
    while True:
        left = 2**15 - position % 2**15
        if left < 7:  # too little for the head of a record: zeros
            position += left
        if position + 7 > len(content):
            return
        _, size, piece = struct.unpack_from("<IHB", content, position)
        position += 7 + size
        if piece == 0 or position > len(content):
            return
        whole += content[position - size : position]
        if piece in (1, 4):  # the only or the last one
            yield whole
            whole = b""


def _teardown() -> None:
    with suppress(Exception):
        wandb.teardown(exit_code=1)


def main() -> None:
    """Follows the run folder until its training has ended; goes offline where online fails."""
    ignore_signals()
    # Otherwise the exit may wait for that server.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Seconds that a kill may cost.
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    folder, (mode, *status) = run_folder(), sys.argv[2:]
    offline = mode == "offline"
    training = WandbTrainer(int(status[0]) if status else None)
    sync = f"to send this run: wandb sync {shlex.quote(str(folder))}/wandb/offline-run-*"
    about = json.loads((folder / "wandb.json").read_text())
    if offline:
        training.server_answered.set()  # it is not asked
        training.show_line(logging.INFO, f"written offline; {sync}")
    if is_secret(folder):
        logging.disable(logging.INFO)  # of W&B's own log, which says where it is
    try:
        with sole_sender(folder / "wandb"):
            runs = [
                WandbRun(student, about, folder, training, offline=offline, stats=number == 0)
                for number, student in enumerate(about["ids"])
            ]
            follow(folder, runs, training)
            for run in runs:
                run.finish(training.status or 0)
            if offline and any(run.is_torn() for run in runs):
                training.show_line(
                    logging.WARNING,
                    "the disk did not take all that was written offline; the same command, typed "
                    "again, writes what is missing",
                )
    except Exception as error:  # whatever goes wrong there
        reason = reason_of(error)
        if offline:
            training.show_line(
                logging.WARNING,
                f"stopped ({reason}); metrics.jsonl goes on, and the same command sends the rest",
            )
            sys.exit()
        logged_out = isinstance(error, wandb.errors.UsageError)
        training.go_offline(logging.INFO if logged_out else logging.WARNING, reason)
    if offline:
        training.show_line(logging.INFO, sync)


if __name__ == "__main__":
    main()
