"""The command line of `report`, as Hydra reads it."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence

from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from seed_exp.config.command import flags_to_overrides
from seed_exp.config.compose import config_home
from seed_exp.config.plugins import plugin_folders
from seed_exp.config.schema import ReportConfig


def as_overrides(arguments: Sequence[str]) -> list[str]:
    """The command line of `report` as overrides of Hydra.

    Experiments, with the options of their jobs, become `sweeps`; one folder becomes a list of one.
    """
    words = flags_to_overrides(list(arguments), "report", "experiments")
    words = [
        f"runs=[{word.removeprefix('runs=')}]" if re.match(r"runs=[^\[]", word) else word
        for word in words
    ]
    named = next((word for word in words if word.startswith("experiments=")), None)
    if named is None:
        return words
    own = {field.name for field in dataclasses.fields(ReportConfig)} | {"hydra"}
    swept = [
        word
        for word in words
        if re.match(r"[\w.@/+~]+=", word)
        and re.split(r"[.=]", word)[0] not in own
        and word != named
    ]
    names = [name.strip() for name in named.partition("=")[2].strip("[]").split(",")]
    sweeps = [shlex.join([training_command(name), f"experiments={name}", *swept]) for name in names]
    quoted = ",".join(
        "'" + sweep.replace("\\", "\\\\").replace("'", "\\'") + "'" for sweep in sweeps
    )
    return [word for word in words if word not in (*swept, named)] + [f"sweeps=[{quoted}]"]


def training_command(experiment: str) -> str:
    """The command that the experiment is written for: the key `command` of its file."""
    home = config_home()
    file = home / "experiments" / f"{experiment}.yaml"
    for folder in plugin_folders(home).values():
        if (folder / "experiments" / file.name).exists():
            file = folder / "experiments" / file.name
    try:
        content = OmegaConf.load(file)
    except (OSError, YAMLError):
        return "distill"  # Hydra, which looks for the file next, says what is wrong with it
    return str(OmegaConf.select(content, "command", default="distill"))
