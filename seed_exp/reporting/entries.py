"""Students of runs and of planned jobs, and the match between the two."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from seed_exp.base.average_names import network_behind
from seed_exp.config.schema import OBJECTIVE_CONFIGS, MocoConfig
from seed_exp.config.schema.queues import WithQueue, auto_queue_size
from seed_exp.models.teachers import TEACHERS
from seed_exp.reporting.published import (
    Comparable,
    network_of,
    num_images,
    objective_of,
    students_of,
)
from seed_exp.reporting.runs import Run

WITHOUT_EFFECT = frozenset(
    {
        *("seed", "data.root", "data.val_root", "eval_every", "knn_bank_size", "knn_query_size"),
        "ema_decay",
    }
)
"""Options that may differ between runs of the same cell.

They set the repetition, the places of the images, evaluations during training, and averages, which
have rows of their own.
"""
NO_TEACHER = "no teacher (MoCo-V2)"
WIDEST = 12
"""Most differences to the plan that a note lists; it counts the others."""
Setting = dict[str, Any]
"""Options in which the cells of a table may differ."""


@dataclass(frozen=True)
class PlannedJob:
    """A planned run."""

    command: str
    """Command of the run."""
    overrides: Sequence[str]
    """Options as typed after the command."""
    options: Mapping[str, Any]
    """All decisive options, flattened."""


class Entry(NamedTuple):
    """A student of a run, or of a job without a run."""

    row: str
    """Network of the student, and the decay of an average."""
    setting: Setting
    """Options that decide the student's column."""
    seed: Any
    """Seed of the training."""
    name: str
    """Name of the student in the options, or that of its average."""
    job: PlannedJob | None
    """Job that plans the student, if there is one."""
    run: Run | None
    """Run that trains the student, if there is one."""
    origin: Comparable
    """Facts that decide which published numbers are shown beside the student's."""


def entry_of(
    command: str,
    options: Mapping[str, Any],
    name: str,
    job: PlannedJob | None,
    run: Run | None,
    folders: Mapping[Path, Run],
) -> Entry:
    """The entry of one student.

    Args:
        command: Command of the run or job.
        options: Options of the run or job, flattened.
        name: Name of the student in the options, or that of its average.
        job: Job that plans the student, if there is one.
        run: Run that trains the student, if there is one.
        folders: Resolved folder -> run in it, to find a teacher of our own.
    """
    setting: Setting = {
        key: value
        for key, value in options.items()
        if key not in WITHOUT_EFFECT and not key.startswith(("students.", "teacher."))
    }
    student = network_behind(name, students_of(options))
    row = network_of(options, name)
    if student != name:
        row += f" (EMA {options.get('ema_decay')})"
    own = f"students.{student}."
    for key, value in options.items():
        if key.startswith(own) and key.removeprefix(own) not in ("network", "name"):
            setting[f"student.{key.removeprefix(own)}"] = value
    objective, teacher, teacher_ssl = objective_of(command, options), "", ""
    setting |= {"command": command, "objective.name": objective, "teacher": NO_TEACHER}
    if options.get("objective.effective_neighbours") is not None:
        setting["objective.tau_teacher"] = "calibrated"
    if command == "distill":
        teacher, about = _teacher(options, folders)
        teacher_ssl = str(options.get("teacher_ssl.name"))
        setting |= about
    # An option that is off counts as absent.
    setting = {
        key: value for key, value in setting.items() if value is not None and value is not False
    }
    origin = Comparable(row, teacher, teacher_ssl, objective)
    return Entry(origin.student, setting, options.get("seed"), name, job, run, origin)


def _teacher(options: Mapping[str, Any], folders: Mapping[Path, Run]) -> tuple[str, Setting]:
    """The teacher's network, and the options that tell it from other teachers.

    These include the options of its run, if the teacher is one of our own.
    """
    kept = {
        key: value
        for key, value in options.items()
        if key.startswith("teacher.")
        and key not in ("teacher.network", "teacher.name", "teacher.checkpoint", "teacher.student")
    }
    name = str(options.get("teacher.name") or options.get("teacher.network"))
    if name != "run":
        spec = TEACHERS.get(name)
        return (spec.network if spec else None) or name, {**kept, "teacher": name}
    folder, _, file = str(options.get("teacher.checkpoint")).partition("/students/")
    run = folders.get(Path(folder).resolve())
    if run is None:
        return "", {**kept, "teacher": folder}
    student = options.get("teacher.student") or file.removesuffix(".safetensors") or run.students[0]
    made = entry_of(run.command, run.options, student, None, run, folders)
    return made.row, {
        **kept,
        "teacher": f"{made.row} (ours)",
        **{f"teacher's {key}": value for key, value in made.setting.items()},
    }


def sized_as_found(planned: Sequence[Entry], found: Sequence[Entry]) -> list[Entry]:
    """Planned entries, with the number that queue_size=auto stands for.

    Runs record that number. It depends on the number of images: that of most runs on such data; of
    no runs the published number.
    """
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for entry in found:
        counted[_data_of(entry)][images_of(entry)] += 1
    sized = []
    for entry in planned:
        setting = dict(entry.setting)
        options: dict[str, type[WithQueue] | None] = {
            "objective.queue_size": OBJECTIVE_CONFIGS.get(str(setting.get("objective.name"))),
            "moco.queue_size": MocoConfig,
        }
        for option, kind in options.items():
            if setting.get(option) == "auto" and kind is not None:
                images = counted[_data_of(entry)].most_common(1)
                num, largest = (
                    num_images(images[0][0]) if images else None,
                    kind.published_queue_size,
                )
                setting[option] = auto_queue_size(largest if num is None else num, largest)
        sized.append(entry._replace(setting=setting))
    return sized


def _data_of(entry: Entry) -> str:
    """Text that is the same for entries with the same options of the data."""
    return key_of({key: value for key, value in entry.setting.items() if key.startswith("data.")})


def match_runs(planned: Sequence[Entry], found: Sequence[Entry], notes: list[str]) -> list[Entry]:
    """Planned entries, each replaced by the runs found for it where there are any.

    Runs of planned cells with other seeds are kept as well. Each run that is left out gets a note.
    """
    cells = {(entry.row, key_of(entry.setting)): entry for entry in reversed(planned)}
    same = [entry for entry in found if (entry.row, key_of(entry.setting)) in cells]
    counted = Counter(images_of(entry) for entry in same).most_common()
    images = min((name for name, num in counted if num == counted[0][1]), default=None)
    kept = []
    for entry in same:
        assert entry.run is not None
        if images_of(entry) == images:
            kept.append(entry._replace(job=cells[entry.row, key_of(entry.setting)].job))
        else:
            notes.append(
                f"{entry.run.folder}: left out, trained on {images_of(entry)}, "
                f"most others on {images}"
            )
    rows = {entry.row for entry in planned}
    teachers = {
        Path(str(options_of(entry).get("teacher.checkpoint"))).resolve()
        for entry in (*planned, *found)
    }
    for entry in found:
        if entry.run is not None and entry.run.folder.resolve() in teachers:
            continue
        if entry.row in rows and (entry.row, key_of(entry.setting)) not in cells:
            assert entry.run is not None
            nearest = min(
                (
                    _difference(plan.setting, entry.setting)
                    for plan in planned
                    if plan.row == entry.row
                ),
                key=lambda one: (len(one), one),
            )
            shown = ", ".join(nearest[:WIDEST]) + (
                f" and {len(nearest) - WIDEST} more" if len(nearest) > WIDEST else ""
            )
            notes.append(f"{entry.run.folder}: {entry.name} is not of this experiment: {shown}")
    filled = {(entry.row, key_of(entry.setting), entry.seed) for entry in kept}
    jobs = {(entry.row, key_of(entry.setting), entry.seed): entry.job for entry in planned}
    kept = [
        entry._replace(job=jobs.get((entry.row, key_of(entry.setting), entry.seed)))
        for entry in kept
    ]
    missing = [
        entry for entry in planned if (entry.row, key_of(entry.setting), entry.seed) not in filled
    ]
    order = {
        place: number
        for number, place in enumerate(
            dict.fromkeys((entry.row, key_of(entry.setting)) for entry in planned)
        )
    }
    return sorted([*kept, *missing], key=lambda entry: order[entry.row, key_of(entry.setting)])


def _difference(plan: Setting, setting: Setting) -> list[str]:
    return [
        f"{key} is {setting.get(key)}, planned {plan.get(key)}"
        for key in sorted(plan.keys() | setting.keys())
        if plan.get(key) != setting.get(key)
    ]


def options_of(entry: Entry) -> Mapping[str, Any]:
    """Options of the entry's run, or of its job if there is no run; flattened."""
    maker: Run | PlannedJob | None = entry.run or entry.job
    assert maker is not None
    return maker.options


def images_of(entry: Entry) -> str:
    """Fingerprint of the images on which the entry's run trains; `unknown` without a run."""
    return "unknown" if entry.run is None else entry.run.inputs.get("data", "unknown")


def key_of(setting: Setting) -> str:
    """Text that is the same for equal settings."""
    return json.dumps(setting, sort_keys=True, default=str)
