"""The headers of student files: the facts that say what network a file holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from seed_exp import __version__
from seed_exp.config.schema import CropConfig, StudentConfig, ViewsConfig
from seed_exp.models.weights import refuse_long_header


def read_header(path: Path) -> dict[str, Any] | None:
    """The header that `save_student` wrote into the file at `path`; None if the file has none.

    Raises:
        ValueError: the header does not describe a student.
    """
    metadata = _metadata(path)
    if "seed_exp" not in metadata:
        return None
    try:
        header: dict[str, Any] = json.loads(metadata["seed_exp"])
        newer = {**header["student"]}.keys() - {option.name for option in fields(StudentConfig)}
        if not newer:
            recorded_config(header)
        _ = header["embedding_dim"] + 0
        if "eval_views" in header:
            header["eval_views"] = _checked_views(header["eval_views"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{path} has a header that describes no student ({type(error).__name__})"
        ) from None
    if newer:
        raise ValueError(
            f"{path} describes its student by {', '.join(map(repr, sorted(newer)))}, which "
            f"seed_exp {__version__} does not know: a newer version wrote it; update seed_exp"
        )
    return header


def _checked_views(recorded: dict[str, Any]) -> dict[str, Any]:
    """The preparation of images that a header records, with the defaults of what it lacks.

    Raises:
        ValueError, TypeError: it is none.
    """
    views = ViewsConfig(name="eval", crops={"global": CropConfig()}, **recorded)
    sizes = {"eval_size": views.eval_size, "eval_resize": views.eval_resize}
    if not all(type(size) is int for size in sizes.values()):
        raise TypeError("sizes must be whole numbers")
    return {**sizes, "mean": [*map(float, views.mean)], "std": [*map(float, views.std)]}


def recorded_config(header: Mapping[str, Any]) -> StudentConfig:
    """The options of a student from the header of its file."""
    # Files from before 0.2.0 lack the rule: their students have timm's, and hence its dropout.
    return StudentConfig(**{"init_rule": "timm", **header["student"]})


def exported_network(path: Path) -> str | None:
    """The network that `export` noted in the metadata of a student's weights; None otherwise."""
    return _metadata(path).get("network")


def _metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; empty for any other file."""
    refuse_long_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}
