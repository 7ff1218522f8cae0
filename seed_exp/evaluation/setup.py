"""The start of every evaluation of a finished run: its frozen encoders, and labelled images."""

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
    """Students by name, on the device."""
    views: ViewsConfig
    """Views that the students expect; only the options for evaluation are set."""
    record: dict[str, Any]
    """Network, trained steps, file hash and, of averages, decay by student, for results files."""


@dataclass(frozen=True)
class LabelledSources:
    """Training and validation images with their labels."""

    train: Source
    """Training images."""
    val: Source
    """Validation images."""
    num_classes: int
    """Number of classes; labels are 0 to num_classes - 1."""


def load_frozen(run: Path, names: list[str] | None, device: torch.device) -> FrozenRun:
    """The students of a run, frozen.

    Args:
        run: Run folder or student file.
        names: Names of the students to load; None = all.
        device: Target device.

    Raises:
        ValueError: a training replaced files while the processes read them, or as `load_students`.
        FileNotFoundError: there is no such folder or file.
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
            **{key: header[key] for key in ("ema_decay",) if key in header},
        }
        for name, header in headers.items()
    }
    hashes = "".join(header["sha256"] for header in headers.values())
    if len(set(distributed.gather_objects(zlib.crc32(hashes.encode())))) > 1:
        raise ValueError(
            f"a training replaced students of {run} while the processes read them; "
            "type the same command again"
        )
    # All students of a run were trained on the same views.
    options = next(iter(headers.values()))["eval_views"]
    return FrozenRun(
        students, ViewsConfig(name="eval", crops={"global": CropConfig()}, **options), record
    )


def eval_options(views: ViewsConfig) -> dict[str, Any]:
    """The options of a view recipe that evaluation depends on."""
    return {
        "eval_size": views.eval_size,
        "eval_resize": views.eval_resize,
        "mean": views.mean,
        "std": views.std,
    }


def load_labelled(config: DataConfig) -> LabelledSources:
    """Training and validation images of `config`.

    Raises:
        ValueError: there are no validation images, an image has no label, or validation has labels
            that training lacks.
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
            f"validation labels go from {val.labels.min()} to {val.labels.max()}, "
            f"training labels from {train.labels.min()} to {num_classes - 1}; "
            "they must be the same classes, numbered from 0"
        )
    return LabelledSources(train, val, num_classes)
