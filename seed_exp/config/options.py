"""Options as plain values: which of them decide what a run computes, and how they are written on a command line."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from omegaconf import MISSING

from seed_exp.config.schema import SCHEMAS, DataConfig, StudentConfig

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
        "command",
    }
    | {
        f"tracker.{option}"
        for option in ("name", "project", "entity", "group", "tags", "mode", "artifacts")
    }
)
"""Options that do not change what a run computes: they are not part of its name and may differ when it is resumed."""


def to_plain(config: Any) -> Any:
    """A config as what JSON knows: dicts, lists, strings, numbers."""
    if dataclasses.is_dataclass(config):
        return {
            field.name: to_plain(getattr(config, field.name))
            for field in dataclasses.fields(config)
        }
    if isinstance(config, dict):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, list):
        return [to_plain(value) for value in config]
    return config.value if isinstance(config, Enum) else config


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as {"data.root": ...}."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def decisive_options(options: dict[str, Any]) -> dict[str, Any]:
    """Of nested options those that change what is computed, as {"data.root": ...}."""
    return {key: value for key, value in flatten(options).items() if key not in MAY_CHANGE}


def data_words(options: Mapping[str, Any]) -> list[str]:
    """Of a run's decisive options, flat, those that choose its images, as on a command line."""
    usual = {f"data.{field.name}": field.default for field in dataclasses.fields(DataConfig)}
    chosen = {key: value for key, value in options.items() if key in usual and value != usual[key]}
    return [
        f"data={chosen.pop('data.source', None)}",
        *(f"{key}={value}" for key, value in chosen.items()),
    ]


def effective_options(command: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of the nested options of a run those that decide, flat; one that its version had not yet has the schema's default."""
    defaults = dict(_defaults(SCHEMAS[command], ""))
    for name in options.get("students") or {}:
        defaults |= _defaults(StudentConfig, f"students.{name}.")
    return {**decisive_options(to_plain(defaults)), **decisive_options(options)}


def _defaults(owner: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    types = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        value = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        if dataclasses.is_dataclass(types[field.name]):
            yield from _defaults(types[field.name], f"{prefix}{field.name}.")
        elif value not in (MISSING, dataclasses.MISSING) and not isinstance(value, dict):
            yield f"{prefix}{field.name}", value
