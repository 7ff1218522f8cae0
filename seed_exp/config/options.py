"""Options as plain values: which ones decide what a run computes, and their command line."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

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
"""Options that do not change what a run computes: not part of its name, free when it is resumed."""


def to_plain(config: Any) -> Any:
    """A config in the types of JSON: dicts, lists, strings, numbers."""
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
    """Flattened options: {"data.root": ...} for {"data": {"root": ...}}."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def decisive_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that change what is computed, flattened: {"data.root": ...}."""
    return {key: value for key, value in flatten(options).items() if key not in MAY_CHANGE}
