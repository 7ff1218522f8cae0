"""Option files and schemas of plug-ins, added to Hydra's search."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from hydra.core.config_store import ConfigStore

from seed_exp.base.plugins import Plugin, plugins
from seed_exp.base.registry import refuse_second
from seed_exp.config.schema import OBJECTIVE_CONFIGS, ObjectiveConfig


def plugin_folders(ours: Path) -> dict[str, Path]:
    """The folders with option files of plug-ins, by the plug-in's name.

    The options of their objectives become known to Hydra.

    Args:
        ours: The folder of conf/ and experiments/.

    Raises:
        ValueError: a plug-in raises when it is imported, or adds what exists; with its name.
    """
    return _registered(plugins(), ours)


@functools.cache
def _registered(found: tuple[Plugin, ...], ours: Path) -> dict[str, Path]:
    folders, files = {}, dict[Path, Plugin]()
    for plugin in found:
        for name, schema in plugin.entries("OBJECTIVE_CONFIGS").items():
            _register(plugin, name, schema)
        if plugin.conf is None:
            continue
        folders[plugin.name] = plugin.conf.resolve()
        for path in sorted(plugin.conf.rglob("*.yaml")):
            file = path.relative_to(plugin.conf)
            is_ours = (ours / "conf" / file).exists() or (
                file.parts[0] == "experiments" and (ours / file).exists()
            )
            refuse_second(plugin, f"the option file {file}", is_ours, files.get(file))
            files[file] = plugin
    return folders


def _register(plugin: Plugin, name: str, schema: object) -> None:
    if not (
        isinstance(schema, type)
        and dataclasses.is_dataclass(schema)
        and issubclass(schema, ObjectiveConfig)
        and schema.name == name
    ):
        raise ValueError(
            f"{plugin}: OBJECTIVE_CONFIGS[{name!r}] must be a dataclass that inherits from "
            f'config.schema.ObjectiveConfig, with the field name: str = "{name}"'
        )
    if OBJECTIVE_CONFIGS.get(name) is not schema:
        refuse_second(plugin, f"OBJECTIVE_CONFIGS[{name!r}]", name in OBJECTIVE_CONFIGS, other=None)
        OBJECTIVE_CONFIGS[name] = schema
        ConfigStore.instance().store(group="objective", name=f"{name}_schema", node=schema)
