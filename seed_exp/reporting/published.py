"""Numbers of papers, and whether one of ours may stand beside them."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from seed_exp.models.teachers import TEACHERS
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
"""Training and validation images of the sets with published numbers: they tell the real set from others in its layout."""


@dataclass(frozen=True)
class Published:
    """A row of published.csv."""

    student: str
    teacher: str
    """Its network; empty without a teacher."""
    teacher_ssl: str
    objective: str
    """`moco_v2` without a teacher."""
    protocol: str
    """`knn`, `linear_top1`, ..."""
    dataset: str
    value: float
    """Percent."""
    source: str
    epochs: int | None
    """Of distillation, or of pre-training where there is no teacher."""
    views: str
    """Recipe; empty = not known."""


class Comparable(NamedTuple):
    """What makes a student comparable with a published one."""

    student: str
    """Its network."""
    teacher: str
    """The teacher's network; empty without one."""
    teacher_ssl: str
    objective: str


def read_published(path: Path) -> tuple[list[Published], list[str]]:
    """The rows with a number, and a line for each that cannot be read."""
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
    )


def published_of(
    published: Sequence[Published],
    origin: Comparable,
    protocol: str,
    name: str,
    options: Mapping[str, Any],
) -> Published | None:
    """The published number of this origin; of several, the one with the epochs and views of student `name` in flat options."""
    candidates = [
        row
        for row in published
        if Comparable(row.student, row.teacher, row.teacher_ssl, row.objective) == origin
        and row.protocol == protocol
    ]
    return min(candidates, key=lambda row: len(_other_training(row, name, options)), default=None)


def network_of(options: Mapping[str, Any], student: str) -> str:
    """What the student is: a name of timm, or of models.students.STUDENTS."""
    return str(
        options.get(f"students.{student}.name")
        or options.get(f"students.{student}.network")
        or student
    )


def students_of(options: Mapping[str, Any]) -> list[str]:
    """The names of the students in flat options."""
    return list(dict.fromkeys(key.split(".")[1] for key in options if key.startswith("students.")))


def objective_of(command: str, options: Mapping[str, Any]) -> str:
    """What is minimised."""
    return str(options.get("objective.name")) if command == "distill" else "moco_v2"


def reasons_against(row: Published, run: Run, name: str, result: Result) -> list[str]:
    """Why our number, of the student `name` in `result`, does not compare with the published one; empty if it does."""
    reasons = []
    expected = NUM_IMAGES.get(row.dataset)
    train = result.protocol.get("train", result.protocol.get("bank"))
    if row.protocol.startswith("semi_"):  # a part of it, with so many labels as the protocol has
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
            reasons.append(
                f"linear evaluation with learning rates {', '.join(f'{rate:g}' for rate in rates)}, published: {RESNET_LR:g}"
            )
    if row.protocol.startswith("semi_"):
        reasons += [
            f"fine-tuning with {difference}" for difference in _differing(LABELLED_VIEWS, options)
        ]
    return reasons


def learning_rates(result: Result) -> list[float]:
    """Those of the evaluation, of which the best counts; empty for one that has none."""
    options = result.protocol.get("options")
    if not isinstance(options, dict) or not isinstance(options.get("lrs"), list):
        return []
    return [rate * options.get("optimizer.lr", 1) for rate in options["lrs"]]


def num_images(fingerprint: Any) -> int | None:
    """How many images a source with this fingerprint has."""
    found = re.search(
        r":(\d+):[0-9a-f]{16}(?:\+[0-9a-f]{16})?$|\[(\d+):[0-9a-f]{16}\]$", str(fingerprint)
    )
    return int(found[1] or found[2]) if found else None


def short_fingerprint(fingerprint: Any) -> str:
    """Its readable part: kind, name, number of images."""
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
    """A student that was trained before, a teacher that is not the paper's."""
    reasons = []
    if init := options.get(f"students.{name}.init"):
        reasons.append(f"the student started from {init}")
    if reduce := options.get("teacher.reduce"):
        reasons.append(f"the teacher's embeddings are reduced by {reduce}")
    teacher = options.get("teacher.network")
    if row.teacher and teacher in TEACHERS and row.teacher_ssl in TEACHER_EPOCHS:
        epochs, published = TEACHERS[teacher].epochs, TEACHER_EPOCHS[row.teacher_ssl]
        if epochs != published:
            reasons.append(f"a teacher of {epochs or 'unknown'} epochs, published: {published}")
    return reasons


def _other_head(row: Published, name: str, options: Mapping[str, Any]) -> list[str]:
    reasons = []
    width = options.get(f"students.{name}.hidden_dim")
    if width not in (None, FEATURE_WIDTHS.get(row.student)):
        reasons.append(f"the student's head is {width} wide, published: as its features")
    if options.get(f"students.{name}.deep_head"):
        reasons.append("the student's head is deep, published: two layers")
    return reasons


def _differing(expected: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """What of the options is not as expected; where that is a tuple, one of its values. An option that is absent is."""
    reasons = []
    for key, value in expected.items():
        values = value if isinstance(value, tuple) else (value,)
        if options.get(key, values[0]) not in values:
            reasons.append(f"{key}={options[key]}, published: {' or '.join(map(str, values))}")
    return reasons
