"""A run's students in the formats of other libraries, each checked and with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from seed_exp.base.table import markdown_table
from seed_exp.config.schema import CropConfig, ExportConfig, Precision, ViewsConfig
from seed_exp.data.sources import Source, load_source
from seed_exp.engine.run import list_bad_samples, num_workers_of
from seed_exp.evaluation.features import Extractor
from seed_exp.evaluation.results import run_home
from seed_exp.exporting.card import WeightsOrigin, model_card
from seed_exp.exporting.folders import atomic_folder, refuse_existing
from seed_exp.exporting.formats import FILES, Format, Subject, export_formats, formats_of
from seed_exp.exporting.hub import check_repository, push
from seed_exp.exporting.kept_accuracy import (
    Kept,
    TrialImages,
    kept_by,
    kept_table,
    refuse_loss,
)
from seed_exp.exporting.loaders import timm_lines
from seed_exp.exporting.runtimes import onnx_features
from seed_exp.models.student_header import recorded_config
from seed_exp.models.students import Student, load_students
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
    if len(source) < 2:
        raise ValueError(
            f"{source.fingerprint()} has {len(source)} image; "
            "exported files are tried on two or more"
        )
    errors: dict[str, dict[str, float]] = {}
    for name, (student, header) in students.items():
        images = trial_images(config, source, header["eval_views"])
        subject = subject_of(name, student, header, images)
        formats = formats_of(subject, config.formats)
        origin = WeightsOrigin(header, header["sha256"], run_home(run) / "results")
        with atomic_folder(output / name) as folder:
            errors[name] = export_formats(subject, formats, folder)
            kept = kept_by_formats(subject, formats, folder, images)
            words = images.words() if kept else ""
            card = model_card(
                subject, origin, formats, errors[name], source.fingerprint(), kept, words
            )
            (folder / "README.md").write_text(card)
        print_what_was_written(subject, formats, errors[name], kept, output / name)
        if config.push is not None:
            print(f"pushed to {push(output / name, config.push, FILES)}")
    return errors


def output_folder(config: ExportConfig) -> Path:
    """The folder with a subfolder for each network."""
    return run_home(Path(config.run)) / "export" if config.output is None else Path(config.output)


def subject_of(
    name: str, student: Student, header: Mapping[str, Any], images: TrialImages
) -> Subject:
    """The student of a file with this header, frozen, to be exported and tried on the images."""
    return Subject(
        name,
        student.eval().requires_grad_(False),
        recorded_config(header),
        header["eval_views"],
        images.prepared(NUM_IMAGES),
        images.config.head,
        calibration=lambda: images.prepared(images.config.calibration_images),
        maps=images.config.maps,
    )


def kept_by_formats(
    subject: Subject, formats: Mapping[str, Format], folder: Path, images: TrialImages
) -> dict[str, Kept]:
    """Agreement of each format of fewer bits with the network, which is the first, "onnx".

    Empty if there is no such format.

    Raises:
        ValueError: one keeps too little.
    """
    reduced = {name: each for name, each in formats.items() if each.min_cosine is not None}
    if not reduced:
        return {}
    files = {name: folder / each.file for name, each in reduced.items()}
    programs = {name: onnx_features(path) for name, path in files.items()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    kept = kept_by(
        {"onnx": subject.student.features, **programs},
        {"onnx": subject.onnx.ByteSize(), **sizes},
        images,
    )
    config = images.config
    for name, each in reduced.items():
        bound = each.min_cosine if config.min_cosine is None else config.min_cosine
        assert bound is not None
        refuse_loss(name, each.file, kept[name], kept["onnx"], bound, config.max_knn_drop)
    return kept


def print_what_was_written(
    subject: Subject,
    formats: Mapping[str, Format],
    errors: Mapping[str, float],
    kept: Mapping[str, Kept],
    folder: Path,
) -> None:
    """Prints the errors, what formats of fewer bits keep, and a line that loads the network."""
    print(
        markdown_table(
            [subject.name, "relative error"],
            [[key, f"{error:.1e}"] for key, error in errors.items()],
        )
    )
    if kept:
        print(kept_table(kept))
    print(f"written to {folder}")
    if "timm" in formats:
        lines = timm_lines(subject.config, subject.student.encoder, folder)
        print(lines.replace("\n", "; "))


def trial_images(config: ExportConfig, train: Source, eval_views: dict[str, Any]) -> TrialImages:
    """Images prepared for a network with these views; unreadable ones as `config.data` says."""
    extract = Extractor(
        EvalViews(ViewsConfig(name="eval", crops={"global": CropConfig()}, **eval_views)),
        torch.device("cpu"),
        num_workers_of(config.data),
        batch_size=64,
        precision=Precision.float32,
        bad_samples=list_bad_samples(config.data, run_home(Path(config.run))),
    )
    return TrialImages(config, train, extract)
