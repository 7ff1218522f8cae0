"""A run is a folder named by its options: the same command finds it again, another command cannot continue it."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from tqdm import tqdm

from seed_exp import __version__
from seed_exp.config.schema import FitConfig
from seed_exp.engine import distributed
from seed_exp.files import write_json
from seed_exp.redaction import redact, redact_all, unsigned

log = logging.getLogger("seed_exp")

MAY_CHANGE = frozenset(
    {
        "run_dir",
        "device",
        "log_every",
        "checkpoint_every",
        "keep_every",
        "resume",
        "data.num_workers",
        "data.download",
        "data.on_error",
        "data.max_bad",
        "teacher_cache",
        "evaluations",
    }
    | {f"tracker.{option}" for option in ("name", "project", "entity", "group", "tags", "mode", "artifacts")}
)
"""Options that do not change what a run computes: they are not part of its name and may differ when it is resumed."""


def open_run(command: str, label: str, config: FitConfig, inputs: dict[str, str], root: Path) -> Path:
    """The folder of the run, made if absent, with config.json in it; for processes that open it together, `rank0_first`.

    Args:
        command: Name of the command.
        label: Readable beginning of the folder's name.
        config: All options; those that change results make up the rest of the name, together with `inputs`.
        inputs: Fingerprints of what the run reads (images, a teacher's weights), by name.
        root: The folder in which it is, unless `config.run_dir` names it.

    Raises:
        ValueError: the folder holds a run with other options, the message lists the differences; or a run without any.
    """
    content = {"command": command, "version": __version__, "options": to_plain(config), "inputs": inputs}
    decisive = _decisive(content)
    if config.run_dir is not None:
        folder = Path(config.run_dir)
    else:
        digest = hashlib.sha256(json.dumps([command, decisive], sort_keys=True).encode()).hexdigest()
        folder = root / f"{label}-{digest[:8]}"
    file = folder / "config.json"
    if file.exists():
        _refuse_other_options(folder, json.loads(file.read_text()), command, decisive)
    elif (folder / "checkpoints").exists() or (folder / "students").exists():
        raise ValueError(
            f"{folder} holds checkpoints or students, but no config.json that says of what; put it back, "
            "or choose another run_dir"
        )
    else:
        write_json(file, redact_all(content))
    return folder


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """While it is entered, no other process may train in the run folder; rank 0 holds it for all.

    A record lock of POSIX: the system lets go of it when the process ends, however it ends, it is not inherited by worker
    processes, which may outlive a killed parent, and it works between machines on NFS.

    Raises:
        ValueError: another process holds it.
    """
    if distributed.rank() != 0:
        yield
        return
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{folder} is in use by {file.read().strip() or 'another process'}; wait for it, or choose another run_dir"
            ) from None
        except OSError as error:  # a network file system without locks
            log.warning("%s cannot be locked (%s): make sure that only one process trains in it", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def decisive_options(options: dict[str, Any]) -> dict[str, Any]:
    """Of nested options those that change what is computed, as {"data.root": ...}."""
    return {key: value for key, value in flatten(options).items() if key not in MAY_CHANGE}


def to_plain(config: Any) -> Any:
    """A config as what JSON knows: dicts, lists, strings, numbers."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, list):
        return [to_plain(value) for value in config]
    return config.value if isinstance(config, Enum) else config


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as {"data.root": ...}."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _decisive(content: dict[str, Any]) -> dict[str, Any]:
    """Of the content of a config.json all that changes what is computed; an address that was signed anew is the same."""
    options = {
        key: unsigned(value) if isinstance(value, str) else value for key, value in decisive_options(content["options"]).items()
    }
    return options | {f"content of {name}": value for name, value in content["inputs"].items()}


def _refuse_other_options(folder: Path, found: dict[str, Any], command: str, decisive: dict[str, Any]) -> None:
    if found["command"] != command:
        raise ValueError(f"{folder} is a run of {found['command']}, not of {command}; choose another run_dir")
    differences = list(_differences(_decisive(found), redact_all(decisive)))
    if differences:
        raise ValueError(
            f"{folder} holds a run with other options: {'; '.join(differences)}. "
            "Give the old options to resume it, or choose another run_dir"
        )


def _differences(found: dict[str, Any], given: dict[str, Any]) -> Iterator[str]:
    absent = "absent"
    for key in sorted(found.keys() | given.keys()):
        if found.get(key, absent) != given.get(key, absent):
            yield f"{key} was {found.get(key, absent)}, now {given.get(key, absent)}"


class _Redacting(logging.Formatter):
    """Without the secrets that a path or an error message may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Console(logging.Handler):
    """Lines above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to(folder: Path) -> None:
    """Sends what is logged to the terminal and, with time stamps, to log.txt in `folder`; nothing on ranks other than 0."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(logging.DEBUG if distributed.rank() == 0 else logging.ERROR)
    console = _Console()
    console.setLevel(logging.INFO)
    console.setFormatter(_Redacting())
    log.addHandler(console)
    if distributed.rank() == 0:
        file = logging.FileHandler(folder / "log.txt")
        file.setFormatter(_Redacting("%(asctime)s %(message)s"))
        log.addHandler(file)
    log.info("run folder: %s", os.fspath(folder))
