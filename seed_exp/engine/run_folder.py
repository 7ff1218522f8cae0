"""Run folders, named by their options: the same command finds its own, no other can continue it."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from seed_exp import __version__
from seed_exp.base.files import sole_process, write_json
from seed_exp.base.plugins import plugins
from seed_exp.base.redaction import printable, redact_all
from seed_exp.base.stopping import Stopped
from seed_exp.config.identity import differences, digest, identity, identity_before_samples
from seed_exp.config.options import to_plain
from seed_exp.config.schema import TRAINING, FitConfig, Precision
from seed_exp.engine import distributed

log = logging.getLogger("seed_exp")


def folder_of(
    command: str, label: str, config: FitConfig, inputs: dict[str, str], root: Path
) -> Path:
    """The run's folder: `config.run_dir`, or one in `root` that is named by what changes results.

    Args:
        command: Name of the command.
        label: Readable beginning of the folder's name.
        config: All options.
        inputs: Fingerprints of what the run reads (images, a teacher's weights), by name.
        root: Where a folder without `config.run_dir` is.
    """
    if config.run_dir is not None:
        return Path(config.run_dir)
    folder = root / f"{label}-{digest(command, identity(config, inputs))}"
    earlier = root / f"{label}-{digest(command, identity_before_samples(config, inputs))}"
    return earlier if earlier.exists() and not folder.exists() else folder


def claim_folder(
    folder: Path,
    command: str,
    config: FitConfig,
    inputs: dict[str, str],
    formats: Mapping[str, Precision] | None = None,
) -> dict[str, Precision]:
    """Writes config.json into the folder of a new run, and compares that of an earlier one.

    Args:
        folder: The run's folder.
        command: Name of the command.
        config: All options.
        inputs: Fingerprints of what the run reads, by name.
        formats: Number formats of a new run's networks on this CPU, by name.

    Returns:
        The networks that the run computes in bfloat16 on a CPU because its first start chose so. An
        earlier run keeps its own, whatever this CPU can do; versions that chose none had none.

    Raises:
        ValueError: the folder holds a run with other options (the message lists the differences),
            or a run without config.json.
    """
    file = folder / "config.json"
    half: dict[str, Precision] = {
        name: precision
        for name, precision in (formats or {}).items()
        if precision is Precision.bfloat16
    }
    if file.exists():
        found = json.loads(file.read_text())
        _refuse_another_run(folder, found, command, config, inputs)
        return {name: Precision(value) for name, value in found.get("cpu_precision", {}).items()}
    if (folder / "checkpoints").exists() or (folder / "students").exists():
        raise ValueError(
            f"{folder} holds checkpoints or students, but no config.json that says of what; "
            "put it back, or choose another run_dir"
        )
    options = to_plain(config)
    content = {"command": command, "version": __version__, "options": options, "inputs": inputs}
    if half:
        content["cpu_precision"] = to_plain(half)
    if added := {plugin.name: plugin.version for plugin in plugins()}:
        content["plugins"] = added
    write_json(file, redact_all(content))
    return half


@contextmanager
def run_lock(folder: Path) -> Iterator[bool]:
    """Keeps other processes out of the run folder until the context ends; rank 0 holds it for all.

    Its value says whether this process holds it.

    Raises:
        ValueError: another process holds it.
    """
    if distributed.rank() != 0:
        yield False
        return
    with sole_process(folder / "lock", folder, "choose another run_dir") as held:
        yield held


def _refuse_another_run(
    folder: Path, found: dict[str, Any], command: str, config: FitConfig, inputs: dict[str, str]
) -> None:
    if found["command"] != command:
        raise ValueError(
            f"{folder} is a run of {found['command']}, not of {command}; choose another run_dir"
        )
    if lines := differences(found, config, inputs):
        longer = [line for line in lines if line.startswith(("steps was ", "epochs was "))]
        way = (
            "; a training of another length is another run, because its learning rate falls "
            f"otherwise. students.NAME.init={folder} starts it from these students"
            if longer and command in TRAINING
            else ""
        )
        raise ValueError(
            f"{folder} holds a run with other options: {'; '.join(lines)}. "
            f"Give the old options to resume it, or choose another run_dir{way}"
        )


class _Printable(logging.Formatter):
    """Formats without the secrets and control characters that a path or an error may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Console(logging.Handler):
    """Writes lines above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _LogFile(logging.FileHandler):
    """Appends to a file; a full disk costs lines, and neither shows tracebacks nor ends the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Sends the log to the terminal and, with time stamps, to log.txt in `folder`.

    Ranks other than 0 show errors only. When the context ends, the handlers from before are back.
    """
    before = log.level, log.propagate, list(log.handlers)
    console = _Console()
    console.setLevel(logging.INFO)
    console.setFormatter(_Printable())
    handlers: list[logging.Handler] = [console]
    if distributed.rank() == 0:
        file = _LogFile(folder / "log.txt")
        file.setFormatter(_Printable("%(asctime)s %(message)s"))
        handlers.append(file)
    log.handlers[:] = handlers
    log.propagate = False
    log.setLevel(logging.DEBUG if distributed.rank() == 0 else logging.ERROR)
    log.info("run folder: %s", os.fspath(folder))
    is_outermost = not any(isinstance(handler, _Console) for handler in before[2])
    stopped = False
    try:
        yield
    except Stopped:
        stopped = True
        raise
    finally:
        # A signal ends the process: whatever is said then, such as a requeue, belongs here too.
        if not (stopped and is_outermost):
            level, log.propagate, log.handlers[:] = before
            log.setLevel(level)
            for handler in handlers:
                handler.close()
