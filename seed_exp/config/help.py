"""The text that `--help` prints."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from seed_exp.config.compose import VERSION_BASE, choices_among, config_home, groups
from seed_exp.config.deviations import published
from seed_exp.config.schema import SCHEMAS

MAX_WIDTH = 100
"""Columns of the widest line, however wide the terminal is."""


class Section(NamedTuple):
    """Options under one heading: the command's own, or those of one nested dataclass."""

    name: str
    meaning: str
    options: list[tuple[str, str, str]]
    """Key, value and meaning of each."""


def help_text(name: str, description: str, words: list[str]) -> str:
    """The help of a command: description, config groups, every option with its value and meaning.

    The values are the defaults of the config groups' options that `words` choose.
    """
    with initialize_config_dir(str(config_home() / "conf"), version_base=VERSION_BASE):
        config = compose(name, choices_among(words), return_hydra_config=True)
    choices = config.hydra.runtime.choices
    chosen = {group: [str(option).partition("/")[0]] for group, option in choices.items()}
    for word in choices_among(words):  # Hydra does not say which options a list chooses
        group, _, names = word.partition("=")
        chosen.setdefault(group, re.findall(r"\w+", names))
    deviations = published([name, *(f"{group}/{one}" for group in chosen for one in chosen[group])])
    width = max(40, min(shutil.get_terminal_size().columns, MAX_WIDTH))

    def wrapped(text: str, indent: int, hanging: int = 0) -> list[str]:
        # Neither commands nor numbers are broken: a longer word sticks out.
        return textwrap.wrap(
            text,
            width,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + hanging),
            break_long_words=False,
            break_on_hyphens=False,
        )

    lines = [description.strip(), ""]
    lines += wrapped("Config groups (GROUP=OPTION; a star marks the chosen one):", 0, 2)
    for group, options in groups().items():
        if group in chosen:
            marked = (f"{option}*" if option in chosen[group] else option for option in options)
            lines += wrapped(f"{group:<12} {' '.join(marked)}", 2, 13)
    lines.append("")
    lines += wrapped("Options (KEY=VALUE, here the defaults; in brackets: published values):", 0, 2)
    for section in _sections(name, config):
        lines += ["", *wrapped(f"{section.name}: {section.meaning}", 0, 2)]
        for key, value, meaning in section.options:
            lines += wrapped(f"{key}={value} {deviations.get(key, '')}", 2, 4)
            lines += wrapped(meaning, 8)
    lines += [
        "",
        *wrapped("Sweeps: -m and comma-separated values, e.g. -m seed=0,1,2.", 0, 2),
        *wrapped(
            "Options of another choice: GROUP=OPTION --help. Hydra's flags: --hydra-help.", 0, 2
        ),
    ]
    return "\n".join(lines)


def _sections(name: str, config: DictConfig) -> list[Section]:
    """The command's own options, then a section for each option that has options itself."""
    meanings = _meanings(SCHEMAS[name])
    sections = {
        field.name: Section(field.name, meanings[field.name], [])
        for field in dataclasses.fields(SCHEMAS[name])
        if _has_options(config, field.name)
    }
    own = Section(name, "Options of the command itself.", [])
    for option in _options(SCHEMAS[name], config, ""):
        sections.get(option[0].partition(".")[0], own).options.append(option)
    return [own, *sections.values()]


def _has_options(config: DictConfig, key: str) -> bool:
    return not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig)


def _options(owner: type[Any], config: DictConfig, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Key, value and meaning of each option in `config`, a node of type `owner`; nested too."""
    meanings = _meanings(owner)
    types = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        key = f"{prefix}{field.name}"
        if not _has_options(config, field.name):
            choices = _choices(types[field.name])
            named = f" One of {', '.join(choices)}." if choices else ""
            yield key, _shown(config, field.name), meanings.get(field.name, "") + named
            continue
        node = config[field.name]
        kind = OmegaConf.get_type(node)
        if dataclasses.is_dataclass(kind):
            yield from _options(typing.cast("type[Any]", kind), node, f"{key}.")
        else:  # a dict: its entries are of one kind
            for entry in node:
                kind = typing.cast("type[Any]", OmegaConf.get_type(node, entry))
                yield from _options(kind, node[entry], f"{key}.{entry}.")


def _choices(kind: Any) -> list[str]:
    """The names that an option of type `kind` can take; none if it takes anything but names."""
    kinds = (kind, *typing.get_args(kind))  # X | None too
    enums = [one for one in kinds if isinstance(one, type) and issubclass(one, Enum)]
    return [str(choice.value) for enum in enums for choice in enum]


def _shown(config: DictConfig, key: str) -> str:
    """A value as it is written on the command line."""
    if OmegaConf.is_missing(config, key):
        return "???"
    value = config[key]
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return value.name if isinstance(value, Enum) else str(value)


def _meanings(owner: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass and of the dataclasses that it inherits from."""
    bases = reversed([base for base in owner.__mro__ if dataclasses.is_dataclass(base)])
    return {
        field: meaning
        for base in bases
        for field, meaning in _field_strings(Path(inspect.getfile(base)))[base.__name__].items()
    }


@functools.cache
def _field_strings(file: Path) -> dict[str, dict[str, str]]:
    """By class of a module: the string under each of its fields."""
    found: dict[str, dict[str, str]] = {}
    for definition in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(definition, ast.ClassDef):
            continue
        found[definition.name] = {}
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                assert isinstance(field.target, ast.Name)
                found[definition.name][field.target.id] = str(below.value.value)
    return found
