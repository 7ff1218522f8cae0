"""The process that sends what a run logs to a service, and for which training never waits.

`engine.tracking` starts it and writes FOLDER/<service>.json. The run folder is the queue: the
process follows metrics.jsonl, speed.jsonl and media/index.json and sends each step once, as a
whole. It begins behind the last step that was delivered, by this process or an earlier one. So
nothing is dropped and nothing is sent twice, whatever was killed when. The next process that is
started for the run sends what has not got through.

One module per service says how: `wandb_process`, `tensorboard_process`, `mlflow_process`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from seed_exp.base.files import open_lock
from seed_exp.base.redaction import redact
from seed_exp.base.stopping import WARNINGS

POLL_S = 0.5
"""Seconds between two looks at the files."""
LINGER_S = 60
"""Seconds that this process goes on when the training has ended."""
RETRY_S = 60
"""Seconds until a service that has failed is tried again."""

_LONGEST_REASON = 160  # characters; some clients name each layer that failed
_WHAT_IS_KEPT = "metrics.jsonl has everything, and the same command sends what is missing"


class Trainer:
    """The connection to the process that trains: hears how it ends, passes lines to its user.

    Args:
        status: Exit status of the training, if it is known already.
    """

    def __init__(self, status: int | None = None) -> None:
        self.pid, self.status = os.getppid(), status
        self.ended = threading.Event()
        # A number of its own for the pipe: what a service's client prints goes nowhere, and its
        # processes do not keep the pipe open.
        self._pipe = os.dup(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        threading.Thread(target=self._listen, daemon=True).start()

    def show_line(self, level: int, text: str) -> None:
        """Shows one line to the user, while the training is there to show it."""
        with suppress(OSError):
            os.write(self._pipe, f"{json.dumps([level, text])}\n".encode())

    def hurry(self) -> None:
        """Called when the training has ended, in a thread of its own."""

    def _listen(self) -> None:
        while self.status is None:
            if select.select([0], [], [], 1)[0]:
                self.status = int(os.read(0, 16) or 1)
            elif os.getppid() != self.pid:  # killed; workers that it forked may keep the pipe open
                self.status = 1
        self.ended.set()
        self.hurry()
        time.sleep(LINGER_S)
        os._exit(1)


class StudentRun(ABC):
    """A student's run at a service; it begins when there is something to send.

    Args:
        student: Name of the student.
        about: Content of the service's file in the run folder.
        folder: Run folder.
        training: The process that trains.
    """

    def __init__(
        self, student: str, about: Mapping[str, Any], folder: Path, training: Trainer
    ) -> None:
        self.student, self.about, self.folder, self.training = student, about, folder, training
        self.id: str = about["ids"][student]
        self.delivered = -1
        """The last step that the service has."""
        self._begun = False
        self._weights = Path(about["weights"][student]) if student in about["weights"] else None
        self._sent_weights: int | None = None

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends the student's part of a step: its own metrics, and those of no student."""
        if step > self.delivered and not self._begun:
            self.delivered = self.begin()
            self._begun = True
        if step <= self.delivered:
            return
        others = tuple(f"{name}/" for name in self.about["ids"] if name != self.student)
        mine = {
            key.removeprefix(f"{self.student}/"): value
            for key, value in row.items()
            if not key.startswith(others)
        }
        self.write(step, mine)
        self.delivered = step

    def send_weights(self) -> None:
        """Sends the student's file if it has changed since the last time."""
        if not self._begun or self._weights is None or not self._weights.exists():
            return
        written = self._weights.stat().st_mtime_ns
        if written != self._sent_weights:
            self.write_weights(self._weights)
            self._sent_weights = written

    def finish(self, status: int) -> None:
        """Sends what is left, and ends the run with this exit status of the training."""
        if self._begun:
            self.end(status)

    @abstractmethod
    def begin(self) -> int:
        """Begins the run, or goes on with it; returns the last step that the service has."""

    @abstractmethod
    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends numbers, and pictures and tables as entries of media/index.json, by key."""

    @abstractmethod
    def write_weights(self, path: Path) -> None:
        """Sends the student's file."""

    @abstractmethod
    def end(self, status: int) -> None:
        """Ends a run that has begun."""

    def picture(self, entry: Mapping[str, Any]) -> Path:
        """The file of a picture in media/index.json."""
        return self.folder / "media" / str(entry["picture"])


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


def follow(folder: Path, runs: Sequence[StudentRun], training: Trainer) -> None:
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


def send_all(
    folder: Path,
    service: str,
    make: Callable[[str, Mapping[str, Any], Path, Trainer], StudentRun],
) -> None:
    """Follows the run folder until its training has ended; a service that fails is tried again.

    Args:
        folder: Run folder.
        service: Name of the file with instructions and of the folder with the lock.
        make: Makes the run of a student, which asks the service what it has.
    """
    ignore_signals()
    training = Trainer()
    about = json.loads((folder / f"{service}.json").read_text())
    has_failed = False
    with sole_sender(folder / service):
        while True:
            is_last = training.ended.is_set()
            try:
                # Anew, because only the service knows how much of a failed step it has.
                runs = [make(student, about, folder, training) for student in about["ids"]]
                follow(folder, runs, training)
                for run in runs:
                    run.finish(training.status or 0)
                return
            except Exception as error:  # whatever goes wrong there
                reason = reason_of(error)
            if is_last or training.ended.is_set():
                training.show_line(logging.WARNING, f"stopped ({reason}); {_WHAT_IS_KEPT}")
                return
            if not has_failed:
                training.show_line(
                    logging.WARNING,
                    f"not reached ({reason}); tried again every {RETRY_S} s, {_WHAT_IS_KEPT}",
                )
            has_failed = True
            training.ended.wait(RETRY_S)


def reason_of(error: BaseException) -> str:
    """The beginning of an error's first line, without secrets, or its kind."""
    text = redact(str(error).partition("\n")[0])  # before a cut could hide a half of a secret
    return (
        f"{text[:_LONGEST_REASON]}..." if text[_LONGEST_REASON:] else text or type(error).__name__
    )


def ignore_signals() -> None:
    """Leaves signals to the training, for which they are meant; it then says that it ends."""
    for number in (signal.SIGINT, *WARNINGS):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def sole_sender(place: Path) -> Iterator[None]:
    """Context in which no other process sends this run; waits for one that still does.

    Args:
        place: Folder of the lock, made if absent.
    """
    place.mkdir(exist_ok=True)
    with open_lock(place / "lock") as file:
        with suppress(OSError):  # a network file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def run_folder() -> Path:
    """The run folder, the program's first argument."""
    return Path(sys.argv[1])
