"""Trackers, which take metrics and pictures.

Files in the run folder always get them, and so does one service at most.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from seed_exp.base.files import write_json
from seed_exp.base.optional import require_library
from seed_exp.base.redaction import redact_all
from seed_exp.base.registry import Registry, lookup
from seed_exp.config.schema import TrackerConfig
from seed_exp.engine import distributed

log = logging.getLogger("seed_exp")

T = TypeVar("T", bound="Tracker")


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run for its tracker."""

    command: str
    """Command that trains."""
    label: str
    """Beginning of the folder's name."""
    students: Sequence[str]
    """Names of the networks; metrics called <name>/... are theirs."""
    options: dict[str, Any]
    """All options, nested."""
    weights: Mapping[str, Path] = field(default_factory=dict)
    """Files in which checkpoints leave the students, by name."""


class Tracker:
    """Takes metrics and does nothing with them: the tracker of every rank but 0.

    A context that closes the tracker at its end.
    """

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, SystemExit):
            self.close(error.code if isinstance(error.code, int) else 1)
        elif kind is not KeyboardInterrupt:  # a second Ctrl-C: then everything ends at once
            self.close(0 if error is None else 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes metrics that the run's options determine."""

    def log_speed(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes metrics that depend on the machine: rates, shares of time."""

    def log_picture(self, key: str, draw: Callable[[Path], None]) -> None:
        """Takes a picture, shown once in a run, at the step that was logged last.

        Args:
            key: Name of the picture.
            draw: Writes it as PNG.
        """

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Takes a table, shown once in a run, at the step that was logged last."""

    def missing(self, keys: Sequence[str]) -> list[str]:  # noqa: ARG002
        """The pictures and tables among `keys` that the run has not shown."""
        return []

    def position(self) -> dict[str, int]:
        """Lengths of the files in bytes, with what the disk has not taken yet; for a checkpoint."""
        return {}

    def sync(self) -> None:
        """Makes what was logged durable. It may be called in another thread.

        Raises:
            OSError: the disk does not take it.
        """

    def rewind(self, position: Mapping[str, int]) -> None:
        """Removes what was logged after `position` was taken."""

    def close(self, status: int = 0) -> None:
        """Finishes a run that ends with this exit status; nothing may be logged afterwards.

        Raises:
            OSError: the run has succeeded, but the disk does not take what was logged.
        """


class FileTracker(Tracker):
    """Writes metrics.jsonl and speed.jsonl in the run folder, one line each time.

    They are two files so that metrics.jsonl of a resumed run equals that of an undisturbed one byte
    by byte. Pictures go to media/, tables to its index.json.
    """

    def __init__(self, folder: Path, config: TrackerConfig, facts: RunFacts) -> None:  # noqa: ARG002
        self._files = {
            name: (folder / name).open("ab", buffering=0)
            for name in ("metrics.jsonl", "speed.jsonl")
        }
        self._unwritten = dict.fromkeys(self._files, b"")
        self._lock = threading.Lock()  # of both: one thread logs, and another one syncs
        self._media = folder / "media"
        self._step = 0

    @classmethod
    def require(cls) -> None:
        """Checks that the libraries of this tracker are installed.

        Raises:
            ValueError: one is not; says how to install it.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._write("metrics.jsonl", step, metrics)

    def log_speed(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write("speed.jsonl", step, metrics)

    def log_picture(self, key: str, draw: Callable[[Path], None]) -> None:
        def made() -> dict[str, str]:
            draw(self._media / f"{key}.png")
            return {"picture": f"{key}.png"}

        self._show(key, made)

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._show(key, lambda: {"columns": columns, "rows": rows})

    def missing(self, keys: Sequence[str]) -> list[str]:
        index = self._media / "index.json"
        try:
            shown = json.loads(index.read_text()) if index.exists() else {}
        except (OSError, ValueError):
            return []  # it could not be added to
        return [key for key in keys if key not in shown]

    def position(self) -> dict[str, int]:
        with self._lock:
            return {
                name: file.tell() + len(self._unwritten[name]) for name, file in self._files.items()
            }

    def sync(self) -> None:
        with self._lock:
            for name in self._files:
                self._flush(name)
        for name, file in self._files.items():
            with self._named(name):
                os.fsync(file.fileno())

    def rewind(self, position: Mapping[str, int]) -> None:
        for name, file in self._files.items():
            # Beyond its end the file would grow by zeros.
            file.truncate(min(position.get(name, 0), file.seek(0, os.SEEK_END)))
            file.seek(0, os.SEEK_END)
        # A run that was killed when it had logged all shows the rest at its last step, not at 0.
        with suppress(IndexError, KeyError, ValueError):
            logged = Path(self._files["metrics.jsonl"].name).read_bytes().splitlines()
            self._step = json.loads(logged[-1])["step"]

    def close(self, status: int = 0) -> None:
        try:
            self.sync()
        except OSError as error:
            if status == 0:
                raise
            log.warning("the last lines of %s are lost (%s)", error.filename, error.strerror)
        finally:
            for file in self._files.values():
                file.close()

    def _show(self, key: str, made: Callable[[], Mapping[str, Any]]) -> None:
        index = self._media / "index.json"
        try:
            shown = json.loads(index.read_text()) if index.exists() else {}
            if key not in shown:
                write_json(index, {**shown, key: {"step": self._step, **made()}})
        except (OSError, ValueError) as error:  # a picture is not worth a training
            log.warning("%s is not shown: %s", key, error)

    def _write(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        with self._lock:
            kept = len(self._unwritten[name])
            self._unwritten[name] += (json.dumps({"step": step, **metrics}) + "\n").encode()
            try:
                self._flush(name)
            except OSError as error:
                # A full disk must not end a training; the lines are kept for when it has room.
                if not kept:
                    log.warning("cannot write metrics (%s); training goes on", error)

    def _flush(self, name: str) -> None:
        with self._named(name):
            while self._unwritten[name]:
                written = self._files[name].write(self._unwritten[name])
                self._unwritten[name] = self._unwritten[name][written:]

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Errors of the disk say the name of the file."""
        try:
            yield
        except OSError as error:
            error.filename = os.fspath(self._files[name].name)
            raise


class FollowedTracker(FileTracker):
    """Also starts a process that sends everything to a service: one run per student.

    That process (engine.follower) reads the run folder. Training hands nothing over to it, so
    training neither waits for it nor fails with it. Its instructions are in <NAME>.json, with the
    ids of the runs, under which a resumed run goes on.
    """

    NAME: str
    """Name of the service in files, modules and `tracker=`."""
    TITLE: str
    """Name of the service for people."""
    PATIENCE_S = 10
    """Seconds that the end of a run waits for the service."""

    def __init__(self, folder: Path, config: TrackerConfig, facts: RunFacts) -> None:
        super().__init__(folder, config, facts)
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
            sys.executable,
            "-m",
            f"seed_exp.engine.{self.NAME}_process",
            os.fspath(folder),
            *self.arguments(config),
        ]
        file = folder / f"{self.NAME}.json"
        known = json.loads(file.read_text())["ids"] if file.exists() else {}
        about = {
            "project": config.project,
            "entity": config.entity,
            "group": config.group or facts.label,
            "job_type": facts.command,
            "tags": config.tags,
            "ids": {name: known.get(name) or secrets.token_hex(4) for name in facts.students},
            "names": {
                name: folder.name if len(facts.students) == 1 else f"{name} in {folder.name}"
                for name in facts.students
            },
            "config": facts.options,
            "weights": {name: os.fspath(path) for name, path in facts.weights.items()}
            if config.artifacts
            else {},
        }
        write_json(file, redact_all(about))

    def arguments(self, config: TrackerConfig) -> list[str]:  # noqa: ARG002
        """Arguments of the process, behind the run folder."""
        return []

    def rewind(self, position: Mapping[str, int]) -> None:
        """Removes what was logged after `position` was taken, then starts to send the rest."""
        super().rewind(position)
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a signal to the whole job must not cut off the service
            )
        except OSError as error:
            log.warning("%s does not start (%s); metrics.jsonl has everything", self.TITLE, error)
            return
        self._reports = threading.Thread(
            target=self._pass_on_reports, args=(self._process,), daemon=True
        )
        self._reports.start()

    def close(self, status: int = 0) -> None:
        try:
            super().close(status)
        except OSError:
            status = 1
            raise
        finally:
            self._end_process(status)

    def _end_process(self, status: int) -> None:
        """Says how the training ended, and waits a little until everything is sent."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended
            self._process.stdin.write(f"{status}\n".encode())
            self._process.stdin.close()
        try:
            ended = self._process.wait(self.PATIENCE_S)
        except subprocess.TimeoutExpired:
            log.warning(
                "%s did not finish within %d s; a process of its own goes on for a minute or two, "
                "what is missing then is sent by the same command, typed again",
                self.TITLE,
                self.PATIENCE_S,
            )
            return
        self._reports.join(1)
        if ended != 0:
            log.warning(
                "%s ended with status %d; metrics.jsonl has everything, "
                "the same command sends what is missing",
                self.TITLE,
                ended,
            )

    def _pass_on_reports(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            level, text = json.loads(line)
            log.log(level, "%s: %s", self.TITLE, text)


class WandbTracker(FollowedTracker):
    """Also sends everything to Weights & Biases, or writes it for `wandb sync`."""

    NAME, TITLE = "wandb", "W&B"

    def arguments(self, config: TrackerConfig) -> list[str]:
        """The mode."""
        return [config.mode.value]


class TensorboardTracker(FollowedTracker):
    """Also writes event files for TensorBoard, in tensorboard/ of the run folder."""

    NAME, TITLE = "tensorboard", "TensorBoard"

    @classmethod
    def require(cls) -> None:
        """Checks that TensorBoard is installed."""
        require_library("tensorboard", "tracker=tensorboard", "tensorboard")


class MlflowTracker(FollowedTracker):
    """Also sends everything to MLflow, wherever MLFLOW_TRACKING_URI says."""

    NAME, TITLE = "mlflow", "MLflow"

    @classmethod
    def require(cls) -> None:
        """Checks that MLflow is installed, or its client alone."""
        require_library("mlflow", "tracker=mlflow", "mlflow")


_TRACKERS: dict[str, type[FileTracker]] = {
    "files": FileTracker,
    "mlflow": MlflowTracker,
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
}
TRACKERS: Registry[type[FileTracker]] = Registry("TRACKERS", _TRACKERS)


def build_tracker(folder: Path, config: TrackerConfig, facts: RunFacts) -> Tracker:
    """The tracker of this rank for the run in `folder`.

    Raises:
        ValueError: unknown tracker, or its library is not installed; on every rank.
    """
    tracker = lookup(TRACKERS, config.name, "tracker")
    tracker.require()
    return tracker(folder, config, facts) if distributed.rank() == 0 else Tracker()
