"""From YAML and overrides to one of the dataclasses of `schema`.

Importing this module registers the schemas with Hydra.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Sweep
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from seed_exp.config.of_run import inherited_words
from seed_exp.config.plugins import plugin_folders
from seed_exp.config.schema import OBJECTIVE_CONFIGS, SCHEMAS, OfRunConfig
from seed_exp.config.timm_students import TimmStudents, named_by_network, option_folders
from seed_exp.config.words import with_open_args

VERSION_BASE = "1.3"


def config_home() -> Path:
    """The folder of conf/ and experiments/: in a wheel the package, otherwise the repository."""
    package = Path(__file__).resolve().parents[1]
    return package if (package / "conf").is_dir() else package.parent


def groups() -> dict[str, list[str]]:
    """The config groups of conf/, of plug-ins and of experiments/ with their options.

    Errors as `plugin_folders`.
    """
    home = config_home()
    homes = [home / "conf", *plugin_folders(home).values()]
    folders = [
        folder
        for each in homes
        for folder in sorted(each.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    ]
    found: dict[str, list[str]] = {}
    for folder in [*folders, home / "experiments"]:
        found.setdefault(folder.name, []).extend(file.stem for file in folder.glob("*.yaml"))
    return {group: sorted(options) for group, options in found.items()}


class ExperimentsSource(FileConfigSource):
    """The files of a folder of which only `experiments/` is a config group.

    Other folders that a user has there, such as `runs/`, would be config groups too in Hydra's own
    source of files, and `runs=...` would then choose an option of a group.
    """

    @staticmethod
    def scheme() -> str:
        """The beginning of its entries in the search path, `experiments://`."""
        return "experiments"

    def is_group(self, config_path: str) -> bool:
        """Whether the path is that of a folder in `experiments/`, this one, or the one above."""
        return self._is_own(f"{config_path}/") and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Whether the path is that of an experiment's file."""
        return self._is_own(config_path) and super().is_config(config_path)

    @staticmethod
    def _is_own(config_path: str) -> bool:
        return config_path == "/" or config_path.startswith("experiments/")


class OwnSearchPath(SearchPathPlugin):
    """Makes experiments/, student=timm/NAME and the option files of plug-ins available.

    Whatever the working directory is; other programs in this process that use Hydra see none.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends the folder above experiments/, the source of timm's students, and plug-ins."""
        if all(element.path != str(config_home() / "conf") for element in search_path.get_path()):
            return
        search_path.append(provider="seed_exp", path=f"experiments://{config_home()}")
        search_path.append(provider="seed_exp", path=f"timm://{config_home() / 'conf'}")
        for name, folder in plugin_folders(config_home()).items():
            search_path.append(provider=name, path=f"file://{folder}")


for _command, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_command}_schema", node=_schema)
for _objective, _options in OBJECTIVE_CONFIGS.items():
    ConfigStore.instance().store(group="objective", name=f"{_objective}_schema", node=_options)
for _plugin in (ExperimentsSource, TimmStudents, OwnSearchPath):
    Plugins.instance().register(_plugin)


def typed(config: DictConfig) -> Any:
    """The dataclass instance that `config` describes, with every check of `schema` passed.

    A student of timm is called after its network.

    Raises:
        ValueError: an option that must be given is missing, a value is out of its range, or two
            students have the same name.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"missing option {missing[0]}: add {missing[0]}=VALUE to the command line")
    result: Any = OmegaConf.to_object(config)
    if unknown := _unknown_options(result, ""):
        raise ValueError(f"no option {unknown[0]!r}; leave out the + to see the closest one")
    if hasattr(result, "students"):
        folders = option_folders(config_home() / "conf")
        result.students = named_by_network(result.students, folders)
    return result


def _unknown_options(config: Any, prefix: str) -> list[str]:
    """Options that `+key=value` added to the schema: Hydra accepts them, and nothing reads them."""
    if isinstance(config, dict):
        return [
            name
            for key, value in config.items()
            for name in _unknown_options(value, f"{prefix}{key}.")
        ]
    if not dataclasses.is_dataclass(config):
        return []
    known = {field.name for field in dataclasses.fields(config)}
    unknown = [f"{prefix}{key}" for key in vars(config) if key not in known]
    nested = [
        name for key in known for name in _unknown_options(getattr(config, key), f"{prefix}{key}.")
    ]
    return unknown + sorted(nested)


def compose(command: str, overrides: list[str] | None = None) -> Any:
    """The typed config that `python -m seed_exp.<command> <overrides>` runs with."""
    words = with_open_args(overrides or [])
    refuse_choices_without_name(words)
    if GlobalHydra.instance().is_initialized():  # a command that Hydra started calls this
        return typed(of_its_run(command, hydra_compose(command, words), words))
    with initialize_config_dir(str(config_home() / "conf"), version_base=VERSION_BASE):
        return typed(of_its_run(command, hydra_compose(command, words), words))


def of_its_run(command: str, config: DictConfig, overrides: list[str]) -> DictConfig:
    """`config` with the images and views of the run that a command on trained students is given.

    Args:
        command: Any command.
        config: What `overrides` compose.
        overrides: The command line; it wins over the run.

    Raises:
        ValueError: as `inherited_words`.
    """
    if not issubclass(SCHEMAS[command], OfRunConfig) or OmegaConf.is_missing(config, "run"):
        return config
    words = inherited_words(command, Path(config.run), overrides)
    return hydra_compose(command, [*words, *overrides]) if words else config


def refuse_choices_without_name(overrides: list[str]) -> None:
    """Refuses choices such as student=[0], on which Hydra itself fails with a TypeError.

    Raises:
        ValueError: a config group is given neither a name, nor a list of names, nor a sweep over
            these.
    """
    for override in overrides:
        group = override.partition("=")[0].partition("@")[0].lstrip("+")
        if group not in groups():
            continue
        try:
            value = OverridesParser.create().parse_overrides([override])[0].value()
        except OverrideParseException:
            continue  # Hydra says so
        for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
            names = choice if isinstance(choice, list) else [choice]
            nameless = [repr(name) for name in names if not isinstance(name, str | Sweep | Glob)]
            if nameless or not names:
                chosen = nameless[0] if nameless else "nothing"
                raise ValueError(
                    f"{override} chooses {chosen}, which is no name in config group {group!r}"
                )


def choices_among(words: list[str]) -> list[str]:
    """The words of a command line that choose options of config groups, less those that sweep."""
    found = []
    for word in words:
        if word.partition("=")[0].partition("@")[0].lstrip("+") in groups():
            refuse_choices_without_name([word])
            if not OverridesParser.create().parse_override(word).is_sweep_override():
                found.append(word)
    return found
