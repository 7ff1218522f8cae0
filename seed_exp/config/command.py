"""The frame of every `python -m seed_exp.<command>`: composing, help, errors in one line."""

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
from seed_exp.base.redaction import printable
from seed_exp.base.stopping import Stopped, stop_at_once
from seed_exp.config.compose import (
    VERSION_BASE,
    config_home,
    groups,
    of_its_run,
    refuse_choices_without_name,
    typed,
)
from seed_exp.config.errors import errors_in_one_line, is_for_user, last_words, words_of
from seed_exp.config.help import help_text
from seed_exp.config.schema import SCHEMAS
from seed_exp.config.search import SWEEPER, begin_search, number_to_optimise
from seed_exp.config.words import with_open_args


def command(
    name: str, run: Callable[[Any], Any], description: str | None, *, word: str | None = None
) -> Callable[[], None]:
    """The `main` of command `name`: composes its config, checks and types it, and calls `run`.

    On an error that a user can cause, the command prints one line and exits with status 1.
    HYDRA_FULL_ERROR=1 shows the traceback instead. Any other error keeps its traceback.

    Args:
        name: The command; its primary file is conf/<name>.yaml.
        run: The work, given the typed config.
        description: Beginning of the text of --help.
        word: An option whose value may stand alone at the beginning of the command line: with
            word="bench", `views` means `bench=views`. In any command `--json` means `json=true`,
            for each of its yes-or-no options.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    @functools.wraps(run)
    def job(config: DictConfig) -> float | None:
        try:
            with stop_at_once(), _requeued():
                words = list(HydraConfig.get().overrides.task)
                result = run(typed(of_its_run(name, config, words)))
            searches = HydraConfig.get().runtime.choices["hydra/sweeper"] == SWEEPER
            return number_to_optimise(name, result) if searches and slurm.is_first_task() else None
        except Exception as error:
            for_user = is_for_user(error) and not wants_traceback
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                # The sweep goes on: its launcher has to know which job failed, and why.
                raise _of_job(error, for_user=for_user) from error
            if not for_user:
                raise
            sys.exit(last_words(words_of(error)))

    def main() -> None:
        with errors_in_one_line():
            groups()  # imports plug-ins; what is wrong with one of them is said first
        sys.argv[1:] = with_open_args(flags_to_overrides(sys.argv[1:], name, word))
        if {"-h", "--help"} & set(sys.argv[1:]):
            with errors_in_one_line():
                print(help_text(name, description or "", sys.argv[1:]))
            return
        _refuse_dashes(sys.argv[1:], name)
        _refuse_sweep_of_ranks(sys.argv[1:], name)
        sys.argv[1:] = _without_slurm(sys.argv[1:])
        waits_for_slurm = any(
            argument.startswith("hydra/launcher=") and "slurm" in argument
            for argument in sys.argv[1:]
        )
        with errors_in_one_line(), slurm.stand_in_for_sacct() if waits_for_slurm else nullcontext():
            refuse_choices_without_name(sys.argv[1:])
            if f"hydra/sweeper={SWEEPER}" in sys.argv[1:]:
                sys.argv[1:] = begin_search(name, sys.argv[1:])
            conf = str(config_home() / "conf")
            # Here, because it sets the version base of all Hydra in a program that imports a door.
            start = hydra.main(version_base=VERSION_BASE, config_path=conf, config_name=name)
            with _full_errors():
                start(job)()

    return main


@contextmanager
def _full_errors() -> Iterator[None]:
    """Makes Hydra let errors through until the context ends, instead of printing a summary."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def flags_to_overrides(arguments: list[str], name: str, word: str | None) -> list[str]:
    """The arguments as Hydra reads them: flags of ours and a first word become KEY=VALUE.

    Args:
        arguments: The command line, without the program's name.
        name: The command, whose yes-or-no options are the flags.
        word: The option whose value the first word is; None = the command has no such option.
    """
    flags = {
        f"--{field.name}" for field in dataclasses.fields(SCHEMAS[name]) if field.type == "bool"
    }
    arguments = [
        f"{argument[2:]}=true" if argument in flags else argument for argument in arguments
    ]
    # A word behind a flag of Hydra's may be that flag's value.
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
            option = f"{key.replace('-', '_')}={value or 'VALUE'}"
            sys.exit(f"error: options are written without dashes: {printable(option)}")


def _refuse_sweep_of_ranks(arguments: list[str], name: str) -> None:
    """Ends the command if it is a sweep in one of several processes.

    A process can join one process group only: the next run would find in the common store what the
    first one left there.
    """
    several = int((os.environ | slurm.torchrun_variables()).get("WORLD_SIZE", "1")) > 1
    if several and {"-m", "--multirun"} & set(arguments):
        sys.exit(
            "error: torchrun and srun start the processes of one run, not of a sweep (-m); "
            "give each of its runs its own: "
            f"python -m seed_exp.sweep submit --command {name} --launcher local --gpus N OPTIONS, "
            "or -m hydra/launcher=slurm_8gpu"
        )


@contextmanager
def _requeued() -> Iterator[None]:
    """Around a run: has SLURM start a job again that its warning stopped."""
    try:
        yield
    except Stopped as stopped:
        if not slurm.is_first_task():
            # Status 0: launchers end all processes when one fails, and the first may still write.
            raise SystemExit(0) from None
        slurm.requeue(stopped.signal_name, stopped.folder, stopped.step)
        raise


def _without_slurm(arguments: list[str]) -> list[str]:
    """The arguments with the local launcher in place of SLURM's, if this machine has no SLURM.

    The jobs of a sweep then run one after the other.
    """
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
    """The error of one job of a sweep, its traceback in its text: a launcher carries only text."""
    config = HydraConfig.get()
    text = words_of(error) if for_user else traceback.format_exc()
    return (ValueError if for_user else RuntimeError)(
        f"{text} [job {config.job.num}: {' '.join(config.overrides.task)}]"
    )
