"""Published numbers, and the reasons why one of ours does not compare with one of them."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from seed_exp.base.average_names import network_behind
from seed_exp.config.schema import OBJECTIVE_CONFIGS
from seed_exp.models.teachers import TEACHERS
from seed_exp.reporting.batch_statistics import group_reasons
from seed_exp.reporting.papers import (
    FEATURE_WIDTHS,
    LABELLED_VIEWS,
    LINEAR,
    PAPERS,
    RECIPES,
    RESNET_LR,
    TEACHER_EPOCHS,
)
from seed_exp.reporting.runs import Result, Run

NUM_IMAGES = {"imagenet": (1_281_167, 50_000)}
"""Dataset -> number of its training and validation images.

The numbers tell the real set from others in its layout.
"""
WITHOUT_TEACHER = "moco_v2"
"""Objective of `pretrain`, which has no teacher."""


@dataclass(frozen=True)
class Published:
    """A row of published.csv."""

    student: str
    """Network of the student."""
    teacher: str
    """Network of the teacher; empty without a teacher."""
    teacher_ssl: str
    """Method of the teacher's training; empty = unknown, or no teacher."""
    objective: str
    """Method of the student's training; WITHOUT_TEACHER for that of `pretrain`."""
    protocol: str
    """Evaluation: `knn`, `linear_top1`, ..."""
    dataset: str
    """Images of training and evaluation."""
    value: float
    """Accuracy, percent."""
    source: str
    """Who published the number."""
    epochs: int | None
    """Epochs of the student's training; None = unknown."""
    views: str
    """Recipe of the student's views; empty = unknown."""
    hidden_dim: int | None = None
    """Hidden width of the student's head; None = the width of its features, or not known."""

    @property
    def method(self) -> str:
        """The student's training in words: `sslight without a teacher`, `seed from resnet50`."""
        teacher = f"from {self.teacher}" if self.teacher else "without a teacher"
        ssl = f" ({self.teacher_ssl})" if self.teacher_ssl else ""
        epochs = f", {self.epochs} epochs" if self.epochs else ""
        return f"{self.objective} {teacher}{ssl}{epochs}"


class Comparable(NamedTuple):
    """Facts in which a student and a published one must agree."""

    student: str
    """Network of the student."""
    teacher: str
    """Network of the teacher; empty without a teacher."""
    teacher_ssl: str
    """Method of the teacher's training; empty without a teacher."""
    objective: str
    """Method of the student's training."""


def read_published(path: Path) -> tuple[list[Published], list[str]]:
    """The rows of the file that have a number, and a line for each row that cannot be read."""
    rows, problems = [], []
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                if row["value"]:
                    rows.append(_published(row))
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"{path}, line {line}: {error}")
    return rows, problems


def _published(row: Mapping[str, str]) -> Published:
    names = (
        "student",
        "teacher",
        "teacher_ssl",
        "objective",
        "protocol",
        "dataset",
        "source",
        "views",
    )
    return Published(
        **{name: row[name] for name in names},
        value=float(row["value"]),
        epochs=int(row["epochs"]) if row["epochs"] else None,
        hidden_dim=int(row["hidden_dim"]) if row["hidden_dim"] else None,
    )


def published_of(
    published: Sequence[Published],
    origin: Comparable,
    protocol: str,
    name: str,
    options: Mapping[str, Any],
) -> Published | None:
    """The published number of this origin; None if there is none.

    Of several, the one whose student has the same head comes first, then the one with the fewest
    differences in epochs and views.

    Args:
        published: Numbers to choose from; of equally good ones the first is chosen.
        origin: Facts that must agree.
        protocol: Evaluation that must agree.
        name: Name of the student in the options.
        options: Options of the run, flattened.
    """
    candidates = [
        row
        for row in published
        if Comparable(row.student, row.teacher, row.teacher_ssl, row.objective) == origin
        and row.protocol == protocol
    ]
    return min(
        candidates,
        key=lambda row: (
            len(_other_head(row, name, options)),
            len(_other_training(row, name, options)),
        ),
        default=None,
    )


def references(published: Sequence[Published], networks: Sequence[str]) -> list[Published]:
    """Published numbers of these networks by methods that are not here, such as SSLight.

    They stand below a table for orientation, and never compare. A network of timm has a longer name
    than the published one: `vit_tiny_patch16_224`.
    """
    ours = OBJECTIVE_CONFIGS.keys() | {WITHOUT_TEACHER}
    return [
        row
        for row in published
        if row.objective not in ours
        and any(f"{network}_".startswith(f"{row.student}_") for network in networks)
    ]


def network_of(options: Mapping[str, Any], student: str) -> str:
    """Network of the student, or of the one whose average it is.

    It is a name of timm, or of models.students.STUDENTS.
    """
    student = network_behind(student, students_of(options))
    return str(
        options.get(f"students.{student}.name")
        or options.get(f"students.{student}.network")
        or student
    )


def students_of(options: Mapping[str, Any]) -> list[str]:
    """Names of the students in flattened options."""
    return list(dict.fromkeys(key.split(".")[1] for key in options if key.startswith("students.")))


def objective_of(command: str, options: Mapping[str, Any]) -> str:
    """Method of the run, as published.csv names it."""
    return str(options.get("objective.name")) if command == "distill" else WITHOUT_TEACHER


def reasons_against(row: Published, run: Run, name: str, result: Result) -> list[str]:
    """Why a number of ours does not compare with a published one; empty if it does.

    Args:
        row: The published number.
        run: The run that trained the student.
        name: Name of the student in the run.
        result: The evaluation with our number.
    """
    reasons = []
    expected = NUM_IMAGES.get(row.dataset)
    train = result.protocol.get("train", result.protocol.get("bank"))
    if row.protocol.startswith("semi_"):  # a subset, as large as the protocol says
        train = re.sub(r"\[\d+:[0-9a-f]{16}\]$", "", str(train))
    evaluated = (
        train,
        result.protocol.get("val", result.protocol.get("queries")),
    )
    if expected is None:
        reasons.append(f"published for {row.dataset}, which cannot be recognised here")
    elif num_images(run.inputs.get("data")) != expected[0]:
        reasons.append(
            f"trained on {short_fingerprint(run.inputs.get('data'))}, not on {row.dataset}"
        )
    elif tuple(map(num_images, evaluated)) != expected:
        shown = " and ".join(map(short_fingerprint, evaluated))
        reasons.append(f"evaluated on {shown}, not on {row.dataset}")
    reasons += _other_training(row, name, run.options)
    reasons += _other_networks(row, name, run.options)
    reasons += group_reasons(run.command, run.options)
    if (paper := PAPERS.get(row.objective)) is None:
        return [*reasons, f"how the paper of {row.objective} trained is not known here"]
    reasons += _differing(paper, run.options)
    reasons += _differing(RECIPES.get(row.views, {}), run.options)
    reasons += _other_head(row, name, run.options)
    found = result.protocol.get("options")
    options = found if isinstance(found, dict) else {}
    if row.protocol.startswith("linear_"):
        reasons += [
            f"linear evaluation with {difference}" for difference in _differing(LINEAR, options)
        ]
        rates = learning_rates(result)
        if row.student.startswith("resnet") and rates and RESNET_LR not in rates:
            shown = ", ".join(f"{rate:g}" for rate in rates)
            reasons.append(
                f"linear evaluation with learning rates {shown}, published: {RESNET_LR:g}"
            )
    if row.protocol.startswith("semi_"):
        reasons += [
            f"fine-tuning with {difference}" for difference in _differing(LABELLED_VIEWS, options)
        ]
    return reasons


def learning_rates(result: Result) -> list[float]:
    """Learning rates of the evaluation, of which the best counts; empty if it has none."""
    options = result.protocol.get("options")
    if not isinstance(options, dict) or not isinstance(options.get("lrs"), list):
        return []
    return [rate * options.get("optimizer.lr", 1) for rate in options["lrs"]]


def num_images(fingerprint: Any) -> int | None:
    """Number of images of the source with this fingerprint; None if it does not tell."""
    found = re.search(
        r":(\d+):[0-9a-f]{16}(?:\+[0-9a-f]{16})?$|\[(\d+):[0-9a-f]{16}\]$", str(fingerprint)
    )
    return int(found[1] or found[2]) if found else None


def short_fingerprint(fingerprint: Any) -> str:
    """Readable part of a source's fingerprint: kind, name, number of images."""
    if fingerprint is None:
        return "unknown images"
    return re.sub(r":[0-9a-f]{16}(\+[0-9a-f]{16})?(?=$|\]|\[)", "", str(fingerprint))


def _other_training(row: Published, name: str, options: Mapping[str, Any]) -> list[str]:
    reasons = []
    epochs = options.get(f"students.{name}.epochs") or options.get("epochs")
    if (steps := options.get("steps")) is not None:
        reasons.append(f"{steps} steps, not epochs")
    elif row.epochs is not None and epochs != row.epochs:
        reasons.append(f"{epochs} epochs, published: {row.epochs}")
    if row.views and options.get("views.name") != row.views:
        reasons.append(f"views {options.get('views.name')}, published: {row.views}")
    return reasons


def _other_networks(row: Published, name: str, options: Mapping[str, Any]) -> list[str]:
    """Reasons in the networks: a student that was trained before, another teacher."""
    reasons = []
    if init := options.get(f"students.{name}.init"):
        reasons.append(f"the student started from {init}")
    if reduce := options.get("teacher.reduce"):
        reasons.append(f"the teacher's embeddings are reduced by {reduce}")
    if weight := options.get("objective.dense_weight"):
        reasons.append(f"maps are compared too, with weight {weight:g}")
    if options.get("teacher.embedding") == "features" and row.objective in PAPERS:
        reasons.append("the students learn the teacher's features, published: its head's output")
    if size := options.get("teacher.size"):
        reasons.append(f"the teacher sees global views at {size} pixels")
    teacher = options.get("teacher.network")
    if row.teacher and teacher in TEACHERS and row.teacher_ssl in TEACHER_EPOCHS:
        epochs, published = TEACHERS[str(teacher)].epochs, TEACHER_EPOCHS[row.teacher_ssl]
        if epochs != published:
            reasons.append(f"a teacher of {epochs or 'unknown'} epochs, published: {published}")
    return reasons


def _other_head(row: Published, name: str, options: Mapping[str, Any]) -> list[str]:
    reasons = []
    features = FEATURE_WIDTHS.get(row.student)
    width = options.get(f"students.{name}.hidden_dim")
    width = features if width is None else width
    if width != (published := row.hidden_dim or features):
        shown = published or "as wide as its features"
        reasons.append(f"the student's head is {width} wide, published: {shown}")
    if options.get(f"students.{name}.deep_head"):
        reasons.append("the student's head is deep, published: two layers")
    return reasons


def _differing(expected: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """A line for each option that differs from the expected value.

    A tuple lists accepted values. Absent options count as equal.
    """
    reasons = []
    for key, value in expected.items():
        values = value if isinstance(value, tuple) else (value,)
        if options.get(key, values[0]) not in values:
            reasons.append(f"{key}={options[key]}, published: {' or '.join(map(str, values))}")
    return reasons
