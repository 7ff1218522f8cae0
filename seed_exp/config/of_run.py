"""Options that a command on trained students takes from the run that trained them.

The evaluations, `embed` and `export` are given a run. Its images, the sizes of its views and its
normalisation are their defaults; the command line wins.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from seed_exp.base.redaction import HIDDEN
from seed_exp.config.options import decisive_options
from seed_exp.config.schema import EVALUATIONS, SCHEMAS, DataConfig
from seed_exp.config.words import word

VIEWS = (
    *("crops.global.size", "eval_size", "eval_resize", "mean", "std"),
    "flip_prob",  # a mirrored digit is no digit, in an evaluation neither
)
"""Options of a run's views that views for training with labels take."""
PATHS_BESIDE_ROOT = frozenset({"data.val_root", "data.subset"})
"""Options that say nothing about the images of another data.root."""


def inherited_words(command: str, run: Path, overrides: Sequence[str]) -> list[str]:
    """Words that give `command` the images and views of `run`, less what `overrides` choose.

    No words if `overrides` choose an experiment, which brings its own options, or if nothing can be
    read of the run: the command then says so itself.

    Args:
        command: One of those that have the option `run`.
        run: Run folder or student file.
        overrides: The command line.

    Raises:
        ValueError: an address of the run's images had a secret, which the run does not record; or
            an option that it records would be interpolated.
    """
    given = {re.split("[=@]", override.lstrip("+~"))[0] for override in overrides}
    options = recorded_options(run)
    if "experiments" in given or "data.source" not in options:
        return []
    words = [] if "data" in given else _data_words(command, options, given)
    if "views" not in given and takes_views(command):
        words += view_words(options)
    for found in words:
        if "${" in found:  # of another's run; it could read the environment
            raise ValueError(f"{run} records {found}; no recorded option has a ${{...}} in it")
    return words


def recorded_options(run: Path) -> dict[str, Any]:
    """The decisive options of the training, flattened; empty if they cannot be read."""
    try:
        if run.is_dir():
            return decisive_options(json.loads((run / "config.json").read_text())["options"])
        with safe_open(run, framework="numpy") as file:  # no torch for --help and wrong options
            header = json.loads((file.metadata() or {})["seed_exp"])
        return dict(header["options"])
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def takes_views(command: str) -> bool:
    """Whether the command is an evaluation whose views are to fit those of the run."""
    kind = EVALUATIONS.get(command)
    has_views = "views" in {field.name for field in fields(SCHEMAS[command])}
    return kind is not None and kind.takes_views and has_views


def view_words(options: Mapping[str, Any]) -> list[str]:
    """Words that give an evaluation the sizes and the normalisation of a run with these options."""
    keys = [f"views.{name}" for name in VIEWS]
    return [word(key, options[key]) for key in keys if key in options]


def _data_words(command: str, options: Mapping[str, Any], given: Collection[str]) -> list[str]:
    source = options["data.source"]
    kind = EVALUATIONS.get(command)
    if kind is not None and kind.sources is not None and source not in kind.sources:
        return []
    usual = {f"data.{field.name}": field.default for field in fields(DataConfig)}
    chosen = {
        key: value
        for key, value in options.items()
        if key in usual and value != usual[key] and key not in {*given, "data.source"}
    }
    if "data.root" in given:
        chosen = {key: value for key, value in chosen.items() if key not in PATHS_BESIDE_ROOT}
    root = chosen.get("data.root")
    if source == "imagenet" and root and os.environ.get("SEED_DATA") and not Path(root).exists():
        del chosen["data.root"]  # trained on another machine, which had its own SEED_DATA
    for key, value in chosen.items():
        if HIDDEN in str(value):
            raise ValueError(
                f"the run's {key}={value} had a secret, which the run does not record; "
                f"add {key}=ADDRESS with the secret"
            )
    return [word("data", source), *(word(key, value) for key, value in chosen.items())]
