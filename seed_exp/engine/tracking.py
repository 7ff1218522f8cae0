"""Where metrics go: files in the run folder always, Weights & Biases besides when asked for."""

from __future__ import annotations

import json
import logging
import netrc
import os
import queue
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from seed_exp.config.schema import TrackerConfig, TrackerMode
from seed_exp.engine import distributed
from seed_exp.files import atomic_write
from seed_exp.registry import lookup

log = logging.getLogger("seed_exp")


class Tracker:
    """Takes metrics and does nothing with them: the tracker of every rank but 0."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics that the run's options determine."""

    def log_speed(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics that depend on the machine: rates, shares of time."""

    def position(self) -> dict[str, int]:
        """Where the files end, on disk; for a checkpoint."""
        return {}

    def rewind(self, position: Mapping[str, int]) -> None:
        """Forgets what was logged after `position` was taken."""

    def close(self) -> None:
        """Finishes; nothing may be logged afterwards."""


class FileTracker(Tracker):
    """metrics.jsonl and speed.jsonl in the run folder, one line each time.

    They are two files so that metrics.jsonl of a resumed run equals that of an undisturbed one byte by byte.
    """

    def __init__(self, folder: Path, config: TrackerConfig, options: dict[str, Any]) -> None:  # noqa: ARG002
        self._files = {name: (folder / name).open("ab", buffering=0) for name in ("metrics.jsonl", "speed.jsonl")}
        self._unwritten = dict.fromkeys(self._files, b"")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write("metrics.jsonl", step, metrics)

    def log_speed(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write("speed.jsonl", step, metrics)

    def position(self) -> dict[str, int]:
        """Where the files end, on disk.

        Raises:
            OSError: the disk does not take what was logged.
        """
        for name, file in self._files.items():
            self._flush(name)
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def rewind(self, position: Mapping[str, int]) -> None:
        for name, file in self._files.items():
            file.truncate(min(position.get(name, 0), file.seek(0, os.SEEK_END)))  # beyond its end it would grow by zeros
            file.seek(0, os.SEEK_END)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        kept = len(self._unwritten[name])
        self._unwritten[name] += (json.dumps({"step": step, **metrics}) + "\n").encode()
        try:
            self._flush(name)
        except OSError as error:  # a full disk must not end a training; the lines are kept for when it has room
            if not kept:
                log.warning("cannot write to %s (%s); training goes on", self._files[name].name, error)

    def _flush(self, name: str) -> None:
        while self._unwritten[name]:
            written = self._files[name].write(self._unwritten[name])
            self._unwritten[name] = self._unwritten[name][written:]


class WandbTracker(FileTracker):
    """Also sends everything to Weights & Biases, from a thread of its own: training neither waits for it nor fails with it.

    Without an account it writes an offline run into the run folder and says how to sync it. The run id is kept in wandb_id.txt,
    so that a resumed run goes on under the same name.
    """

    QUEUE_SIZE = 10_000
    """Lines waiting for W&B; beyond that, new ones are dropped (they are in metrics.jsonl in any case)."""
    PATIENCE_S = 30
    """How long the end of a run waits for W&B."""

    def __init__(self, folder: Path, config: TrackerConfig, options: dict[str, Any]) -> None:
        super().__init__(folder, config, options)
        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            with atomic_write(id_file) as file:
                file.write(f"{secrets.token_hex(4)}\n".encode())
        offline = config.mode is TrackerMode.offline or (config.mode is TrackerMode.auto and not _logged_in())
        arguments = {
            "project": config.project,
            "entity": config.entity,
            "group": config.group,
            "tags": config.tags,
            "name": folder.name,
            "id": id_file.read_text().strip(),
            "resume": "allow",
            "dir": str(folder),
            "config": options,
            "mode": "offline" if offline else "online",
        }
        if offline:
            log.info("W&B: no account in use, writing offline; later: wandb sync %s/wandb/offline-run-*", folder)
        self._behind = False
        self._waiting: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, args=(arguments,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        self._put((step, dict(metrics)))

    def log_speed(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log_speed(step, metrics)
        self._put((step, dict(metrics)))

    def close(self) -> None:
        super().close()
        self._waiting.put(None)
        self._thread.join(self.PATIENCE_S)
        if self._thread.is_alive():
            log.warning("W&B did not finish within %d s; metrics.jsonl is complete", self.PATIENCE_S)

    def _put(self, item: tuple[int, dict[str, float]]) -> None:
        if not self._thread.is_alive():
            return  # it has said why
        if self._waiting.qsize() < self.QUEUE_SIZE:
            self._waiting.put(item)
        elif not self._behind:
            self._behind = True  # said once, not at every line
            log.warning("W&B is behind by %d lines; dropping lines there (metrics.jsonl has them all)", self.QUEUE_SIZE)

    def _send(self, arguments: dict[str, Any]) -> None:
        if arguments["mode"] == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # otherwise the exit waits for its server
        try:
            import wandb  # takes a second, and only this tracker needs it

            run = wandb.init(**arguments, settings=wandb.Settings(console="off", silent=True))
            while (item := self._waiting.get()) is not None:
                step, metrics = item
                run.log(metrics, step=step)
            run.finish()
        except Exception as error:  # whatever goes wrong there must not end the training
            log.warning("W&B stopped (%s); metrics.jsonl goes on", str(error).partition("\n")[0] or type(error).__name__)


TRACKERS: dict[str, type[FileTracker]] = {"files": FileTracker, "wandb": WandbTracker}


def build_tracker(folder: Path, config: TrackerConfig, options: dict[str, Any]) -> Tracker:
    """The tracker of this rank for the run in `folder`; `options` are recorded with the run."""
    tracker = lookup(TRACKERS, config.name, "tracker")
    return tracker(folder, config, options) if distributed.rank() == 0 else Tracker()


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
