"""Options of a command as Python values instead of a command line, and Hydra's state kept apart."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seed_exp.config.compose import compose, groups
from seed_exp.config.errors import explain
from seed_exp.config.words import word


def composed(command: str, options: Mapping[str, Any]) -> Any:
    """The typed config that `python -m seed_exp.<command>` makes of the same options.

    Args:
        command: The command.
        options: Values by name; see `words_of`.

    Raises:
        ValueError: as on the command line, such as an option that does not exist.
    """
    with own_hydra():
        return compose(command, words_of(options))


def words_of(options: Mapping[str, Any]) -> list[str]:
    """The command line that says the same as these options.

    A mapping stands for dotted options: {"optimizer": {"lr": 0.1}} is optimizer.lr=0.1. A `data`
    that is a path, and not the name of a data source, chooses the source by what is in the folder.

    Raises:
        ValueError: a name is none of an option, or a value is neither text, number nor list.
    """
    words = []
    for key, value in _flat(options):
        if not re.fullmatch(r"[\w.]+", key) or key.partition(".")[0] == "hydra":
            raise ValueError(f"no option {key!r}; options are called as on the command line")
        if key == "data" and _is_path(value):
            words += _data_in(Path(value))
        else:
            words.append(word(key, _plain(key, value)))
    return words


@contextmanager
def own_hydra() -> Iterator[None]:
    """Hides from this package what Hydra does for others in this process, and puts it back.

    Raises:
        ValueError: Hydra refuses options inside the context; in one line.
    """
    version, job = VersionBase.instance(), JobRuntime.instance()
    before = GlobalHydra.instance().hydra, version.version_base, job.conf
    GlobalHydra.instance().hydra, job.conf = None, OmegaConf.create(job.conf)
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from None
    finally:
        # Not the instance from before: initialize_config_dir leaves a copy of it.
        GlobalHydra.instance().hydra, version.version_base, job.conf = before


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(key: str, value: Any) -> Any:
    """The value in the types of JSON."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(key, one) for one in value]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # a number of numpy or torch
        return value.item()
    raise ValueError(
        f"{key} must be text, a number, true or false, None, a path, or a list of these; "
        f"got {type(value).__name__}"
    )


def _is_path(value: Any) -> bool:
    if isinstance(value, os.PathLike):
        return True
    if not isinstance(value, str) or value in groups()["data"]:
        return False
    return os.sep in value or value.startswith("~") or Path(value).exists()


def _data_in(path: Path) -> list[str]:
    """The words for the images at a path, whatever is there."""
    path = path.expanduser()
    if path.suffix == ".tsv" or (path / "train.tsv").is_file():
        source = "tsv"
    else:
        source = "image_folder" if (path / "train").is_dir() else "photos"
    return [word("data", source), word("data.root", str(path))]
