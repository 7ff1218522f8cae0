"""Hydra's and OmegaConf's errors about a command line, as one line that helps."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from seed_exp.base.archives import lacks_memory
from seed_exp.base.redaction import print_traceback, printable, printable_streams
from seed_exp.base.registry import closest
from seed_exp.base.stopping import INTERRUPTED, INTERRUPTED_STATUS
from seed_exp.config.compose import groups
from seed_exp.config.words import word


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the process with one line and status 1 on an error that a user can cause.

    After Ctrl-C the status is 130.

    Any other error keeps its traceback; with HYDRA_FULL_ERROR=1 in the environment each error does.
    Nothing that is printed shows a secret or controls the terminal: Hydra, for one, prints the
    arguments of a job that failed.
    """
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    sys.excepthook = print_traceback
    try:
        with printable_streams():
            yield
    except KeyboardInterrupt:
        if wants_traceback:
            raise
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(INTERRUPTED_STATUS)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if wants_traceback:
            raise
        sys.exit(last_words(explain(error)))
    except Exception as error:
        if wants_traceback:
            raise
        if is_for_user(error):
            sys.exit(last_words(words_of(error)))
        # A job of a sweep left no result, or was refused. The text holds what the job printed; a
        # traceback of this process tells nothing.
        if not type(error).__module__.startswith("submitit."):
            raise
        sys.exit(last_words(str(error)))


def last_words(error: str) -> str:
    """The line with which a command ends; among several processes it names the rank."""
    if error.startswith("(rank "):  # engine.failure says that another rank failed
        return printable(f"error {error}")
    rank = (
        f" (rank {os.environ['RANK']})"
        if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
        else ""
    )
    return printable(f"error{rank}: {error}")


def explain(error: Exception) -> str:
    """One line: the mistake in the command line, the closest thing that exists, all that exists."""
    if isinstance(error, YAMLError):
        # Its lines name what is wrong, the file and the line.
        return f"an option file cannot be read: {' '.join(str(error).split())}"
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read {error.override!r}; options are written KEY=VALUE, "
            f"in quotes where the value has spaces or brackets{_as_text(error.override or '')}"
        )
    if ambiguous := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'\n", str(error)):
        return _several_values(ambiguous[1], ambiguous[2])
    if unlisted := re.match(
        r"(?:In '([^']+)': )?Could not override '([\w/]+)'. No match in the defaults list",
        str(error),
    ):
        chosen_by = f", which {unlisted[1]} chooses" if unlisted[1] else ""
        return (
            f"this command has no config group {unlisted[2]!r}{chosen_by}; "
            "--help lists its groups and options"
        )
    for cause in _chain(error):
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file:
            group, _, option = cause.missing_cfg_file.partition("/")
            if group not in groups():
                group, _, option = cause.missing_cfg_file.rpartition("/")
            known = closest(option, groups().get(group, []))
            elsewhere = _elsewhere(group, option)
            return f"no option {option!r} in config group {group!r}; {known}{elsewhere}"
        if (
            isinstance(cause, ConfigKeyError | ConfigAttributeError)
            and cause.object_type
            and cause.key
        ):
            return _unknown_key(str(cause.full_key), str(cause.key), _names(cause))
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            several = (
                "; several networks of timm are 'student=[timm/NAME,timm/NAME]'"
                if re.fullmatch(r"students\.\w+\.name", str(cause.full_key))
                else ""
            )
            return f"{cause.full_key}: {_first_line(cause)}{several}"
    return _first_line(error)


def _elsewhere(group: str, name: str) -> str:
    """The way to networks that have no option of their own: runs, and hundreds of timm's."""
    words = {"student": "student=timm/NAME", "teacher": "teacher=timm teacher.name=NAME"}
    if group not in words:
        return ""
    run = ""
    if group == "teacher" and Path(name).is_dir():
        run = f". For a run of this package: teacher=run teacher.checkpoint={name}"
    pattern = re.sub(r"[^\w.]", "*", name)
    return (
        f"{run}. For a network of timm: {words[group]}; "
        f"python -c \"import timm; print(timm.list_models('*{pattern}*'))\" lists names"
    )


def _as_text(override: str) -> str:
    """A proposal to pass the value of the argument as text; empty if it was not meant as text."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[\w.@/+~]+", key) or value[:1] in ("[", "{"):
        return ""
    return f": {shlex.quote(word(key, value))}"


def _several_values(key: str, values: str) -> str:
    """The ways to write an argument with a comma in its value."""
    sweep = f"-m {shlex.quote(f'{key}={values}')}"
    together = shlex.quote(f"{key}=[{values}]")
    if key == "student":
        return (
            f"{key}={values} names several networks; for a fleet in one run, which share the "
            f"teacher's work, type {together}; for a run of each, one after the other, {sweep}"
        )
    if key in groups():
        return f"{key}={values} chooses several; for a run with each, one after the other: {sweep}"
    return (
        f"{key}={values} has a comma; as one text it is {shlex.quote(word(key, values))}, "
        f"as a list {together}, and for a run with each value {sweep}"
    )


def _names(error: OmegaConfBaseException) -> list[str]:
    """The keys that exist where an unknown key was looked for."""
    if dataclasses.is_dataclass(error.object_type):
        return [field.name for field in dataclasses.fields(error.object_type)]
    return [str(key) for key in error.parent_node or ()]


def _unknown_key(full_key: str, key: str, names: list[str]) -> str:
    if "." in full_key:
        prefix = full_key.rpartition(".")[0]
        match = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {prefix}.{match[0]}? " if match else ""
        return f"no option {full_key!r}; {hint}{prefix} has: {', '.join(sorted(names))}"
    return f"no option {full_key!r}; {closest(key, {*names, *groups()} - {key})}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # "In 'experiments/mine': ... while composing config:", and the reason on the next line.
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, innermost first: the innermost is the most exact."""
    if error.__cause__ is not None:
        yield from _chain(error.__cause__)
    yield error


def is_for_user(error: BaseException) -> bool:
    """Whether the error is a message for the user, not a defect with a traceback worth reading.

    A message: this package or Hydra raised it, or the operating system did because of a file or of
    short memory.
    """
    if lacks_memory(error):
        return True
    if not isinstance(error, ValueError | OSError):
        return False
    if isinstance(error, OSError) and error.filename is not None:
        return True
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    raised_in = Path(traceback.tb_frame.f_code.co_filename).resolve()
    packages = {Path(__file__).resolve().parents[1], Path(hydra.__file__).resolve().parent}
    return not packages.isdisjoint(raised_in.parents)


def words_of(error: BaseException) -> str:
    """The text of an error that is for the user."""
    if lacks_memory(error) and not isinstance(error, ValueError):
        reason = _first_line(error)
        return (
            f"too little memory ({reason}); free or ask for more, and type the same command again"
        )
    return str(error)
