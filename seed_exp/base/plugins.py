"""Plug-ins: packages of others that add students, objectives and more, without a change here.

A plug-in is a module with dictionaries that are called like our registries, see docs/extending.md.
It is found by its entry point in the group `seed_exp.plugins`, or by its name in SEED_PLUGINS.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

GROUP = "seed_exp.plugins"
"""Group of the entry points."""
VARIABLE = "SEED_PLUGINS"
"""Environment variable with names of modules, separated by commas.

Not an option of the commands: it has to be known before their options are read, and processes that
load images, jobs of a sweep and later evaluations need the same plug-ins.
"""
REGISTRIES = (
    "STUDENTS",
    "TEACHERS",
    "TEACHER_SSL",
    "OBJECTIVES",
    "OBJECTIVE_CONFIGS",
    "SOURCES",
    "VIEW_OPERATIONS",
    "TRACKERS",
)
"""Names of the dictionaries that a plug-in may have."""
FOLDER = "CONF"
"""Name of its path of a folder with option files, one folder per config group as in conf/."""


@dataclass(frozen=True)
class Plugin:
    """A plug-in that has been imported."""

    name: str
    """Name of its entry point, or of its module."""
    version: str | None
    """Version of the package that has the entry point."""
    module: ModuleType

    def __str__(self) -> str:
        return f"plug-in {self.name} ({self.module.__name__})"

    @property
    def conf(self) -> Path | None:
        """Folder of its option files."""
        return getattr(self.module, FOLDER, None)

    def entries(self, registry: str) -> Mapping[str, Any]:
        """Its entries for one of REGISTRIES; text is the place of one, "module:name"."""
        entries: Mapping[str, Any] = getattr(self.module, registry, {})
        return entries

    def entry(self, registry: str, name: str) -> Any:
        """One of its entries, imported if need be.

        Raises:
            ValueError: it cannot be imported.
        """
        entry = self.entries(registry)[name]
        if not isinstance(entry, str):
            return entry
        module, _, attribute = entry.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except Exception as error:  # whatever the code of others raises
            raise ValueError(
                f"{self}: {registry}[{name!r}], {entry}, cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error


def plugins() -> tuple[Plugin, ...]:
    """All plug-ins, imported when they are first asked for.

    Raises:
        ValueError: one raises when it is imported, or adds nothing; with its name.
    """
    return _imported(os.environ.get(VARIABLE, ""))


@functools.cache
def _imported(listed: str) -> tuple[Plugin, ...]:
    points = {(point.name, point.value): point.dist for point in entry_points(group=GROUP)}
    found = [
        _plugin(name, module, None if package is None else package.version)
        for (name, module), package in points.items()
    ]
    named = {plugin.module.__name__ for plugin in found}
    modules = dict.fromkeys(module.strip() for module in listed.split(",") if module.strip())
    return (*found, *(_plugin(module, module, None) for module in modules if module not in named))


def _plugin(name: str, module: str, version: str | None) -> Plugin:
    try:
        plugin = Plugin(name, version, import_module(module))
    except Exception as error:  # whatever the code of others raises
        raise ValueError(
            f"plug-in {name} ({module}) raises when it is imported: "
            f"{type(error).__name__}: {error}; repair or uninstall it, or take it out of {VARIABLE}"
        ) from error
    if not any(hasattr(plugin.module, attribute) for attribute in (*REGISTRIES, FOLDER)):
        raise ValueError(f"{plugin} adds nothing; it has none of {', '.join(REGISTRIES)}, {FOLDER}")
    for registry in REGISTRIES:
        if not isinstance(plugin.entries(registry), Mapping):
            raise ValueError(f"{plugin}: {registry} must be a dictionary of entries by name")
    if plugin.conf is not None and not Path(plugin.conf).is_dir():
        raise ValueError(f"{plugin}: {FOLDER}={plugin.conf} is no folder of option files")
    return plugin
