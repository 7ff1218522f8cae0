"""A run's students in the formats of other libraries, each checked and with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from seed_exp.base.table import markdown_table
from seed_exp.config.schema import CropConfig, ExportConfig, ViewsConfig
from seed_exp.data.sources import Source, load_source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.evaluation.results import run_home
from seed_exp.exporting.card import WeightsOrigin, model_card
from seed_exp.exporting.folders import atomic_folder, refuse_existing
from seed_exp.exporting.formats import FILES, Subject, export_formats, formats_of
from seed_exp.exporting.hub import check_repository, push
from seed_exp.exporting.loaders import timm_lines
from seed_exp.models.student_header import recorded_config
from seed_exp.models.students import load_students
from seed_exp.views.recipe import EvalViews

NUM_IMAGES = 16
"""Images on which each file is tried."""


def export(config: ExportConfig) -> dict[str, dict[str, float]]:
    """Writes a folder for each network and prints the errors.

    Returns:
        {student: {format: relative error}}.
    """
    run = Path(config.run)
    if config.push is not None:
        check_repository(config.push)
    students = load_students(run, config.networks)
    if config.push is not None and len(students) != 1:
        raise ValueError(
            f"push takes one network, {run} has {', '.join(students)}; "
            f"choose it with networks=[{next(iter(students))}]"
        )
    output = output_folder(config)
    for name in students:
        refuse_existing(output / name)
    source = load_source(config.data, "train")
    errors: dict[str, dict[str, float]] = {}
    for name, (student, header) in students.items():
        images = seen_by(source, header["eval_views"])
        config_of = recorded_config(header)
        subject = Subject(
            name,
            student.eval().requires_grad_(False),
            config_of,
            header["eval_views"],
            images,
            config.head,
        )
        formats = formats_of(subject, config.formats)
        origin = WeightsOrigin(header, header["sha256"], run_home(run) / "results")
        with atomic_folder(output / name) as folder:
            errors[name] = export_formats(subject, formats, folder)
            (folder / "README.md").write_text(
                model_card(subject, origin, formats, errors[name], source.fingerprint())
            )
        print(
            markdown_table(
                [name, "relative error"],
                [[key, f"{error:.1e}"] for key, error in errors[name].items()],
            )
        )
        print(f"written to {output / name}")
        if "timm" in formats:
            print(timm_lines(config_of, student.encoder, output / name).replace("\n", "; "))
        if config.push is not None:
            print(f"pushed to {push(output / name, config.push, FILES)}")
    return errors


def output_folder(config: ExportConfig) -> Path:
    """The folder with a subfolder for each network."""
    return run_home(Path(config.run)) / "export" if config.output is None else Path(config.output)


def seen_by(source: Source, eval_views: dict[str, Any]) -> Tensor:
    """NUM_IMAGES evenly spaced images of the source, prepared for the network [N, 3, S, S]."""
    if len(source) < 2:
        raise ValueError(
            f"{source.fingerprint()} has {len(source)} image; "
            "exported files are tried on two or more"
        )
    views = EvalViews(ViewsConfig(name="eval", crops={"global": CropConfig()}, **eval_views))
    indices = evenly_spaced(len(source), NUM_IMAGES)
    return views.inputs([source.image(index) for index in indices.tolist()]).contiguous()
