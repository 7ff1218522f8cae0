"""Numbers of papers, and whether one of ours may stand beside them."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from seed_exp.reporting.runs import Result, Run

NUM_IMAGES = {"imagenet": (1_281_167, 50_000)}
"""Training and validation images of the sets with published numbers: they tell the real set from others in its layout."""
PAPER: dict[str, Any] = {
    "batch_size": 256,
    "objective.queue_size": 65536,
    "objective.tau_student": 0.2,
    "optimizer.lr": 0.03,
    "moco.queue_size": 65536,
    "moco.temperature": 0.2,
    "moco.momentum": 0.999,
}
"""What SEED and MoCo-V2 were trained with; a run with other values does not repeat them."""
PAPER_LINEAR: dict[str, Any] = {"epochs": 100, "steps": None, "batch_size": 256, "optimizer.milestones": [60.0, 80.0]}
"""What they were evaluated with (MoCo, arXiv:1911.05722); the learning rate depends on the network."""


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


class Origin(NamedTuple):
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
    names = ("student", "teacher", "teacher_ssl", "objective", "protocol", "dataset", "source", "views")
    return Published(
        **{name: row[name] for name in names}, value=float(row["value"]), epochs=int(row["epochs"]) if row["epochs"] else None
    )


def published_of(published: Sequence[Published], origin: Origin, protocol: str, options: Mapping[str, Any]) -> Published | None:
    """The published number of this origin; of several, the one whose epochs and views are those of the flat `options`, if any."""
    candidates = [
        row
        for row in published
        if Origin(row.student, row.teacher, row.teacher_ssl, row.objective) == origin and row.protocol == protocol
    ]
    return min(candidates, key=lambda row: len(_other_training(row, options)), default=None)


def network_of(options: Mapping[str, Any], student: str) -> str:
    """What the student is: a name of timm, or of models.students.STUDENTS."""
    return str(options.get(f"students.{student}.name") or options.get(f"students.{student}.network") or student)


def students_of(options: Mapping[str, Any]) -> list[str]:
    """The names of the students in flat options."""
    return list(dict.fromkeys(key.split(".")[1] for key in options if key.startswith("students.")))


def objective_of(command: str, options: Mapping[str, Any]) -> str:
    """What is minimised."""
    return str(options.get("objective.name")) if command == "distill" else "moco_v2"


def reasons_against(row: Published, run: Run, result: Result) -> list[str]:
    """Why our number, of `result`, does not compare with the published one; empty if it does."""
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
        reasons.append(f"trained on {short_fingerprint(run.inputs.get('data'))}, not on {row.dataset}")
    elif tuple(map(num_images, evaluated)) != expected:
        shown = " and ".join(map(short_fingerprint, evaluated))
        reasons.append(f"evaluated on {shown}, not on {row.dataset}")
    reasons += _other_training(row, run.options)
    reasons += _differing(PAPER, run.options)
    if result.evaluation == "linear":
        options = result.protocol.get("options")
        differing = _differing(PAPER_LINEAR, options if isinstance(options, dict) else {})
        reasons += [f"linear evaluation with {difference}" for difference in differing]
    return reasons


def num_images(fingerprint: Any) -> int | None:
    """How many images a source with this fingerprint has."""
    found = re.search(r":(\d+):[0-9a-f]{16}$|\[(\d+):[0-9a-f]{16}\]$", str(fingerprint))
    return int(found[1] or found[2]) if found else None


def short_fingerprint(fingerprint: Any) -> str:
    """Its readable part: kind, name, number of images."""
    if fingerprint is None:
        return "unknown images"
    return re.sub(r":[0-9a-f]{16}(?=$|\]|\[)", "", str(fingerprint))


def _other_training(row: Published, options: Mapping[str, Any]) -> list[str]:
    reasons = []
    if (steps := options.get("steps")) is not None:
        reasons.append(f"{steps} steps, not epochs")
    elif row.epochs is not None and options.get("epochs") != row.epochs:
        reasons.append(f"{options.get('epochs')} epochs, published: {row.epochs}")
    if row.views and options.get("views.name") != row.views:
        reasons.append(f"views {options.get('views.name')}, published: {row.views}")
    return reasons


def _differing(expected: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    return [f"{key}={options[key]}, published: {value}" for key, value in expected.items() if options.get(key, value) != value]
