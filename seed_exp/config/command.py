"""What every `python -m seed_exp.<command>` shares: composing, help, errors in one line."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from seed_exp.base import slurm
from seed_exp.base.stopping import Stopped, stop_at_once
from seed_exp.config.compose import VERSION_BASE, config_home, groups, refuse_nameless, typed
from seed_exp.config.errors import in_one_line, is_for_user, last_words
from seed_exp.config.help import help_text
from seed_exp.config.schema import SCHEMAS


def command(
    name: str, run: Callable[[Any], Any], description: str | None, *, word: str | None = None
) -> Callable[[], None]:
    """Makes `run`, which takes a typed config, the command `name`, whose help begins with `description`.

    `word` names an option whose value may stand alone at the beginning: with word="bench", `views` is `bench=views`. The
    command's yes-or-no options may be given as flags: `--json` is `json=true`.

    On an error that a user can cause, the command prints one line and exits with status 1; HYDRA_FULL_ERROR=1 shows the
    traceback instead. Any other error keeps its traceback.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    @hydra.main(
        version_base=VERSION_BASE, config_path=str(config_home() / "conf"), config_name=name
    )
    @functools.wraps(run)
    def job(config: DictConfig) -> None:
        try:
            with stop_at_once(), _requeued():
                run(typed(config))
        except Exception as error:
            for_user = (
                isinstance(error, ValueError | OSError)
                and is_for_user(error)
                and not wants_traceback
            )
            if (
                HydraConfig.get().mode is RunMode.MULTIRUN
            ):  # it goes on: the launcher has to know which job failed and why
                raise _of_job(error, for_user=for_user) from error
            if not for_user:
                raise
            sys.exit(last_words(str(error)))

    def main() -> None:
        sys.argv[1:] = spelled_out(sys.argv[1:], name, word)
        if {"-h", "--help"} & set(sys.argv[1:]):
            with in_one_line():
                print(help_text(name, description or "", sys.argv[1:]))
            return
        _refuse_dashes(sys.argv[1:], name)
        _refuse_sweep_of_ranks(sys.argv[1:], name)
        sys.argv[1:] = _without_slurm(sys.argv[1:])
        waits_for_slurm = any(
            argument.startswith("hydra/launcher=") and "slurm" in argument
            for argument in sys.argv[1:]
        )
        with in_one_line(), slurm.stand_in_for_sacct() if waits_for_slurm else nullcontext():
            refuse_nameless(sys.argv[1:])
            os.environ["HYDRA_FULL_ERROR"] = (
                "1"  # Hydra then lets errors through instead of printing its own summary
            )
            job()

    return main


def spelled_out(arguments: list[str], name: str, word: str | None) -> list[str]:
    """The arguments as Hydra wants them: KEY=VALUE for a flag of ours and for a first argument that is only a word."""
    flags = {
        f"--{field.name}" for field in dataclasses.fields(SCHEMAS[name]) if field.type == "bool"
    }
    arguments = [
        f"{argument[2:]}=true" if argument in flags else argument for argument in arguments
    ]
    # What follows a flag of Hydra's may be that flag's value.
    options = itertools.takewhile(lambda argument: not argument.startswith("-"), arguments)
    position = next(
        (number for number, argument in enumerate(options) if "=" not in argument), None
    )
    if word is not None and position is not None:
        arguments[position] = f"{word}={arguments[position]}"
    return arguments


def _refuse_dashes(arguments: list[str], name: str) -> None:
    known = {field.name for field in dataclasses.fields(SCHEMAS[name])} | set(groups())
    for argument in arguments:
        key, _, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and key.partition(".")[0].replace("-", "_") in known:
            sys.exit(
                f"error: options are written without dashes: {key.replace('-', '_')}={value or 'VALUE'}"
            )


def _refuse_sweep_of_ranks(arguments: list[str], name: str) -> None:
    """A process can be in one process group only: the next one would find what the first left in their common store."""
    several = int((os.environ | slurm.torchrun_variables()).get("WORLD_SIZE", "1")) > 1
    if several and {"-m", "--multirun"} & set(arguments):
        sys.exit(
            "error: torchrun and srun start the processes of one run, not of a sweep (-m); give each of its runs its own: "
            f"python -m seed_exp.sweep submit --command {name} --launcher local --gpus N OPTIONS, or -m hydra/launcher=slurm_8gpu"
        )


@contextmanager
def _requeued() -> Iterator[None]:
    """Around a run: a SLURM job that a warning has stopped is started again."""
    try:
        yield
    except Stopped as stopped:
        if not slurm.is_first_task():
            # Not as failed: launchers end all processes when one fails, and the first may still be writing.
            raise SystemExit(0) from None
        slurm.requeue(stopped.signal_name, stopped.folder, stopped.step)
        raise


def _without_slurm(arguments: list[str]) -> list[str]:
    """The arguments of a sweep for this machine, where it has no SLURM: its jobs then run one after the other."""
    launcher = next(
        (argument for argument in arguments if argument.startswith("hydra/launcher=slurm")), None
    )
    if launcher is None or shutil.which("sbatch") is not None:
        return arguments
    print(
        f"no SLURM here (no sbatch on PATH): hydra/launcher=local instead of {launcher}",
        file=sys.stderr,
    )
    others = [
        argument
        for argument in arguments
        if not argument.lstrip("+").startswith(("hydra/launcher=", "hydra.launcher."))
    ]
    return [*others, "hydra/launcher=local"]


def _of_job(error: Exception, *, for_user: bool) -> Exception:
    """The error of one job of a sweep, with all that is to be known of it in its text: a launcher carries no traceback."""
    config = HydraConfig.get()
    text = str(error) if for_user else traceback.format_exc()
    return (ValueError if for_user else RuntimeError)(
        f"{text} [job {config.job.num}: {' '.join(config.overrides.task)}]"
    )
