"""The jobs of a sweep, as Hydra expands it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from seed_exp.base.registry import lookup
from seed_exp.config.compose import VERSION_BASE, compose, config_home
from seed_exp.config.errors import explain
from seed_exp.config.words import with_open_args


def jobs(command: str, overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of `python -m seed_exp.<command> -m <overrides>`, in Hydra's order.

    An experiment's own sweep (hydra.sweeper.params) is expanded too; the command line wins over it.

    Raises:
        HydraException: no such experiment, an override that cannot be read, or a sweep over
            anything but listed values.
    """
    with initialize_config_dir(str(config_home() / "conf"), version_base=VERSION_BASE):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        # hydra.compose() refuses sweeps; these are the steps of Hydra itself for -m.
        words = with_open_args(overrides)
        config = hydra.compose_config(command, words, RunMode.MULTIRUN, from_shell=False).hydra
        swept = [f"{key}={values}" for key, values in (config.sweeper.params or {}).items()]
        parser = OverridesParser.create(hydra.config_loader)
        (expanded,) = BasicSweeper.split_arguments(
            parser.parse_overrides([*swept, *config.overrides.task]), None
        )
    return [[*config.overrides.hydra, *job] for job in expanded]


def composed_jobs(command: str, overrides: list[str]) -> list[tuple[list[str], Any]]:
    """Overrides and typed config of each job of a sweep, also inside a command that Hydra runs.

    Raises:
        ValueError: no such experiment or option, or a value is out of its range.
    """
    try:
        with _outside_hydra():
            return [(job, compose(command, job)) for job in jobs(command, overrides)]
    except HydraException as error:
        raise ValueError(explain(error)) from None


@contextmanager
def _outside_hydra() -> Iterator[None]:
    """Hides from Hydra that it runs this command: it composes for one command at a time."""
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running  # in the copy that initialize_config_dir leaves


def launcher_profile(
    command: str, words: list[str], launcher: str, options: list[str]
) -> dict[str, Any]:
    """The options of a launcher profile of conf/hydra/launcher, with `options` applied.

    Raises:
        ValueError: no such profile, or an option that the profile does not have.
    """
    profiles = {
        file.stem: file for file in (config_home() / "conf" / "hydra" / "launcher").glob("*.yaml")
    }
    lookup(profiles, launcher, "launcher")
    with initialize_config_dir(str(config_home() / "conf"), version_base=VERSION_BASE):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        overrides = [*words, f"hydra/launcher={launcher}", *options]
        config = hydra.compose_config(
            command, overrides, RunMode.MULTIRUN, from_shell=False
        ).hydra.launcher
        profile: Any = OmegaConf.to_container(config, resolve=True)
    return dict(profile)
