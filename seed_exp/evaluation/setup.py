"""What every evaluation of a finished run starts from: its encoders, frozen, and labelled images."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seed_exp.config.schema import CropConfig, DataConfig, ViewsConfig
from seed_exp.data.sources import Source, load_source
from seed_exp.engine import distributed
from seed_exp.models.students import Student, load_students


@dataclass(frozen=True)
class FrozenRun:
    """The students of a run in evaluation mode."""

    students: dict[str, Student]
    views: ViewsConfig
    """How the students want to see images: only its evaluation part is set."""
    record: dict[str, Any]
    """By student: network, steps trained, hash of its file; for the files of results."""


@dataclass(frozen=True)
class LabelledSources:
    """Training and validation images with their labels."""

    train: Source
    val: Source
    num_classes: int


def load_frozen(run: Path, names: list[str] | None, device: torch.device) -> FrozenRun:
    """The students `names` (None = all) of the run folder or student file `run`, frozen.

    Raises:
        ValueError: the processes found different ones; or as `load_students`.
    """
    loaded = load_students(run, names)
    students = {
        name: student.requires_grad_(False).eval().to(device)
        for name, (student, _) in loaded.items()
    }
    headers = {name: header for name, (_, header) in loaded.items()}
    record = {
        name: {
            **header["student"],
            "step": header["step"],
            "command": header["command"],
            "sha256": header["sha256"],
        }
        for name, header in headers.items()
    }
    hashes = "".join(header["sha256"] for header in headers.values())
    if len(set(distributed.everyones(zlib.crc32(hashes.encode())))) > 1:
        raise ValueError(
            f"a training replaced students of {run} while the processes read them; type the same command again"
        )
    options = next(iter(headers.values()))[
        "eval_views"
    ]  # the students of a run were trained on the same views
    return FrozenRun(
        students, ViewsConfig(name="eval", crops={"global": CropConfig()}, **options), record
    )


def eval_options(views: ViewsConfig) -> dict[str, Any]:
    """The part of a recipe that evaluation needs to know."""
    return {
        "eval_size": views.eval_size,
        "eval_resize": views.eval_resize,
        "mean": views.mean,
        "std": views.std,
    }


def load_labelled(config: DataConfig) -> LabelledSources:
    """Training and validation images of `config`.

    Raises:
        ValueError: there are no validation images, images without labels, or validation labels that training does not have.
    """
    with distributed.rank0_first():
        train, val = load_source(config, "train"), load_source(config, "val")
    if train.labels is None or val.labels is None:
        raise ValueError(
            f"evaluation needs labels, and some images of data source {config.source!r} have none"
        )
    num_classes = int(train.labels.max()) + 1
    if (
        int(val.labels.max()) >= num_classes
        or min(int(val.labels.min()), int(train.labels.min())) < 0
    ):
        raise ValueError(
            f"validation labels go from {val.labels.min()} to {val.labels.max()}, training labels from {train.labels.min()} to "
            f"{num_classes - 1}; they must be the same classes, numbered from 0"
        )
    return LabelledSources(train, val, num_classes)
