"""Sends what a run logs to Weights & Biases, in a process for which training never waits.

  python -m seed_exp.engine.wandb_process FOLDER auto|offline

`engine.tracking` starts it and writes FOLDER/wandb.json. The run folder is the queue: this process
follows metrics.jsonl, speed.jsonl and media/index.json and sends each step once, as a whole. It
begins behind the last step that was delivered, by this process or an earlier one. So nothing is
dropped and nothing is sent twice, whatever was killed when. The next process that is started for
the run sends what has not got through.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import shlex
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import wandb

from seed_exp.base.files import open_lock
from seed_exp.base.stopping import REQUEUE_STATUS, WARNINGS

POLL_S = 0.5
"""Seconds between two looks at the files."""
INIT_TIMEOUT_S = 30
"""Seconds that the server may take to answer at first; after that the run is written offline."""
FLUSH_S = 5
"""Seconds after the end of an offline run in which W&B may still write its file."""
GRACE_S = 3
"""Seconds that the server may still take to answer when the training has ended."""
LINGER_S = 60
"""Seconds that this process goes on when the training has ended."""


class Trainer:
    """The connection to the process that trains: hears how it ends, passes lines to its user.

    Args:
        status: Exit status of the training, if it is known already.
    """

    def __init__(self, status: int | None) -> None:
        self.pid, self.status = os.getppid(), status
        self.ended = threading.Event()
        self.server_answered = threading.Event()
        self._leaving = threading.Lock()
        # A number of its own for the pipe: what W&B prints goes nowhere, and its service does not
        # keep the pipe open.
        self._pipe = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        threading.Thread(target=self._listen, daemon=True).start()

    def show_line(self, level: int, text: str) -> None:
        """Shows one line to the user, while the training is there to show it."""
        with suppress(OSError):
            os.write(self._pipe, f"{json.dumps([level, text])}\n".encode())

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

    def _listen(self) -> None:
        while self.status is None:
            if select.select([0], [], [], 1)[0]:
                self.status = int(os.read(0, 16) or 1)
            elif os.getppid() != self.pid:  # killed; workers that it forked may keep the pipe open
                self.status = 1
        self.ended.set()
        if not self.server_answered.wait(GRACE_S):
            self.go_offline(logging.WARNING, "the server has not answered yet")
        time.sleep(LINGER_S)
        os._exit(1)


class WandbRun:
    """A student's run at W&B; it begins when there is something to send.

    Args:
        student: Name of the student.
        about: Content of wandb.json.
        folder: Run folder.
        offline: Whether the run is written to disk, for `wandb sync`.
        training: The process that trains.
        stats: Whether the load of GPU, memory and so on is recorded with this run.
    """

    def __init__(
        self,
        student: str,
        about: Mapping[str, Any],
        folder: Path,
        *,
        offline: bool,
        training: Trainer,
        stats: bool,
    ) -> None:
        self._student, self._about, self._folder, self._offline = student, about, folder, offline
        self._training, self._stats = training, stats
        self._run: Any = None
        self._delivered = last_step(folder, about["ids"][student]) if offline else -1
        self._weights = Path(about["weights"][student]) if student in about["weights"] else None
        self._sent_weights: int | None = None

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends the student's part of a step: its own metrics, and those of no student."""
        if step <= self._delivered:
            return
        if self._run is None:
            self._begin()
            if step <= self._delivered:
                return
        others = tuple(f"{name}/" for name in self._about["ids"] if name != self._student)
        mine = {
            key.removeprefix(f"{self._student}/"): value
            for key, value in row.items()
            if not key.startswith(others)
        }
        self._run.log(
            {
                key: self._media(value) if isinstance(value, dict) else value
                for key, value in mine.items()
            },
            step=step,
        )
        self._delivered = step

    def send_weights(self) -> None:
        """Sends the student's file if it has changed since the last time."""
        if self._run is None or self._weights is None or not self._weights.exists():
            return
        written = self._weights.stat().st_mtime_ns
        if written != self._sent_weights:
            artifact = wandb.Artifact(f"model-{self._run.id}", type="model")
            artifact.add_file(str(self._weights))
            self._run.log_artifact(artifact)
            self._sent_weights = written

    def finish(self, status: int) -> None:
        """Sends what is left, and ends the run with this exit status of the training."""
        if self._run is not None:
            if status == REQUEUE_STATUS:
                self._run.mark_preempting()
            self._run.finish(exit_code=status)

    def is_torn(self) -> bool:
        """Whether a full disk has cut off what was written for W&B on this machine.

        Asked after `finish`, which on a busy machine returns before W&B's own process has written
        the last lines: only what is missing after FLUSH_S is lost.
        """
        deadline = time.monotonic() + FLUSH_S
        while last_step(self._folder, self._about["ids"][self._student]) < self._delivered:
            if time.monotonic() > deadline:
                return True
            time.sleep(0.1)
        return False

    def _begin(self) -> None:
        about = self._about
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,  # the address of a repository and a diff may hold secrets
            disable_code=True,
            init_timeout=INIT_TIMEOUT_S,
            x_disable_stats=not self._stats,
            x_stats_pid=self._training.pid,
        )
        self._run = wandb.init(
            project=about["project"],
            entity=about["entity"],
            group=about["group"],
            job_type=about["job_type"],
            tags=about["tags"],
            name=about["names"][self._student],
            id=about["ids"][self._student],
            config={"student": self._student, **about["config"]},
            resume="allow",
            reinit="create_new",  # beside those of the other students
            dir=str(self._folder),
            mode="offline" if self._offline else None,  # None: online, or as WANDB_MODE says
            settings=settings,
        )
        self._training.server_answered.set()
        if self._run.offline:  # as asked for here, or by WANDB_MODE
            self._delivered = last_step(self._folder, about["ids"][self._student])
        else:
            self._delivered = self._run.starting_step - 1
            self._training.show_line(logging.INFO, f"{self._student}: {self._run.url}")

    def _media(self, entry: Mapping[str, Any]) -> Any:
        if "picture" in entry:
            return wandb.Image(str(self._folder / "media" / entry["picture"]))
        return wandb.Table(columns=entry["columns"], data=entry["rows"])


class Lines:
    """Lines of a JSONL file that another process writes."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The whole lines that were added since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if line.endswith(b"\n"):
                    self._position += len(line)
                    yield json.loads(line)


def follow(folder: Path, runs: list[WandbRun], training: Trainer) -> None:
    """Sends the content of the run folder, and what is added, until the training has ended.

    The last step waits for the one after it, or for the end of a training that was not interrupted,
    because more may be logged of it.
    """
    metrics, speed = Lines(folder / "metrics.jsonl"), Lines(folder / "speed.jsonl")
    rows: dict[int, dict[str, Any]] = {}
    shown: set[str] = set()
    newest = -1
    ended = False
    while not ended:
        ended = training.ended.wait(POLL_S)
        # Before the other files: they then hold all that belongs to steps before the newest.
        for line in metrics.read():
            newest = line["step"]
            rows.setdefault(newest, {}).update(line)
        for line in speed.read():
            rows.setdefault(line["step"], {}).update(line)
        index = folder / "media" / "index.json"
        media = json.loads(index.read_text()) if index.exists() else {}
        for key in media.keys() - shown:
            rows.setdefault(media[key]["step"], {})[key] = media[key]
        shown |= media.keys()
        done = ended and training.status == 0
        for step in sorted(step for step in rows if step < newest or done):
            row = rows.pop(step)
            row.pop("step", None)
            for run in runs:
                run.send(step, row)
        for run in runs:
            run.send_weights()


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


@contextmanager
def upload_lock(folder: Path) -> Iterator[None]:
    """Context in which no other process sends this run; waits for one that still does."""
    (folder / "wandb").mkdir(exist_ok=True)
    with open_lock(folder / "wandb" / "lock") as file:
        with suppress(OSError):  # a network file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _teardown() -> None:
    with suppress(Exception):
        wandb.teardown(exit_code=1)


def main() -> None:
    """Follows the run folder until its training has ended; goes offline where online fails."""
    for number in (signal.SIGINT, *WARNINGS):
        # They are meant for the training, which then says that it ends.
        signal.signal(number, signal.SIG_IGN)
    # Otherwise the exit may wait for that server.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Seconds that a kill may cost.
    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    folder, mode, *status = sys.argv[1:]
    offline = mode == "offline"
    training = Trainer(int(status[0]) if status else None)
    sync = f"to send this run: wandb sync {shlex.quote(folder)}/wandb/offline-run-*"
    about = json.loads((Path(folder) / "wandb.json").read_text())
    if offline:
        training.server_answered.set()  # it is not asked
        training.show_line(logging.INFO, f"written offline; {sync}")
    try:
        with upload_lock(Path(folder)):
            runs = [
                WandbRun(
                    student,
                    about,
                    Path(folder),
                    offline=offline,
                    training=training,
                    stats=number == 0,
                )
                for number, student in enumerate(about["ids"])
            ]
            follow(Path(folder), runs, training)
            for run in runs:
                run.finish(training.status or 0)
            if offline and any(run.is_torn() for run in runs):
                training.show_line(
                    logging.WARNING,
                    "the disk did not take all that was written offline; the same command, typed "
                    "again, writes what is missing",
                )
    except Exception as error:  # whatever goes wrong there
        reason = str(error).partition("\n")[0] or type(error).__name__
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
