"""What `distill` and `pretrain` share: from a typed config to trained students in a run folder."""

from __future__ import annotations

import copy
import logging
import shlex
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from seed_exp.base.announcement import announce
from seed_exp.base.files import file_hash, write_json
from seed_exp.base.redaction import redact_all
from seed_exp.base.stopping import Stopped
from seed_exp.config.options import data_words, decisive_options, to_plain
from seed_exp.config.schema import (
    DataConfig,
    EncoderFitConfig,
    Precision,
    StudentConfig,
    ViewsConfig,
)
from seed_exp.data.sources import NoValidationError, Source, load_source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine import distributed
from seed_exp.engine.fit import fit
from seed_exp.engine.fleet import derive_seed
from seed_exp.engine.memory import activation_bytes
from seed_exp.engine.method import Method
from seed_exp.engine.precision import autocast
from seed_exp.engine.run_folder import log_to, open_run, run_lock
from seed_exp.engine.tracking import RunFacts, Tracker, build_tracker
from seed_exp.evaluation.features import Extractor
from seed_exp.evaluation.setup import bad_samples_of, eval_options, num_workers_of
from seed_exp.evaluation.votes import knn_accuracy, nearest
from seed_exp.models.students import Student, build_student, read_header, save_student
from seed_exp.reporting.embedding_map import embedding_map
from seed_exp.reporting.image_grids import Neighbours, neighbours_gallery, recipe_gallery
from seed_exp.views.recipe import EvalViews, TrainViews

log = logging.getLogger("seed_exp")

C = TypeVar("C", bound=EncoderFitConfig)
NUM_SHOWN = 8
"""Validation images, and neighbours of each, in a student's gallery."""


OpenFolder = Callable[[dict[str, str]], Path]
"""Given the fingerprints of the weights that a run reads, by name, opens its folder."""


class Built(NamedTuple):
    """What a command makes of its options."""

    folder: Path
    """Of the run, opened."""
    students: dict[str, Student]
    method: Method
    weights: dict[str, str]
    """Fingerprints of those it read, by name."""
    notes: list[str]
    """What is worth knowing before training starts."""


def train_encoders(
    command: str,
    label: str,
    config: C,
    build: Callable[[C, Source, OpenFolder], Built],
    then: Callable[[Path], None],
) -> Path:
    """Trains the students of `config`, from the start or from where the run folder is.

    Args:
        command: Its name, for the run folder.
        label: Readable part of the run folder's name.
        config: All options.
        build: Makes, of the options and the training images, the students and the method that trains them; opens the run folder.
        then: What follows in the run folder, in the same processes.

    Returns:
        The run folder, with students/<name>.safetensors, metrics.jsonl, log.txt, config.json and checkpoints/.
    """
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        with (
            distributed.rank0_first()
        ):  # the first rank downloads and indexes, the others find it done
            train, val = load_source(config.data, "train"), labelled_validation(config.data)
            images = {"data": train.fingerprint()}

            def open_folder(weights: dict[str, str]) -> Path:
                return open_run(command, label, config, weights | images, Path("runs") / command)

            folder, students, method, weights, notes = build(config, train, open_folder)
        log_to(folder)
        if distributed.rank() == 0:
            announce(folder)
        log.info("%d images", len(train))
        for name, student in students.items():
            num_parameters = sum(parameter.numel() for parameter in student.parameters())
            activations = (
                activations_per_image(student, config.views, config.precision, device) / 2**20
            )
            log.info(
                "student %s: %s parameters with its head, %.3g MiB of activations per image",
                name,
                f"{num_parameters:,}",
                activations,
            )

        for note in notes:
            log.info(note)
        if val is None or train.labels is None:
            log.info("no labelled validation images: no k-NN evaluation during training")
        num_workers = num_workers_of(config.data)
        bad_samples = bad_samples_of(config.data, folder)
        extract = Extractor(
            EvalViews(config.views),
            device,
            num_workers,
            precision=config.precision,
            bad_samples=bad_samples,
        )

        last: Evaluated | None = None

        def evaluate(names: Collection[str]) -> dict[str, float]:
            nonlocal last
            if val is None or train.labels is None:
                return {}
            named = {name: students[name] for name in names}
            last = knn_during_training(
                extract, named, train, val, config.knn_bank_size, config.knn_query_size
            )
            return last.accuracies

        facts = {
            "command": command,
            "eval_views": eval_options(config.views),
            "inputs": weights | images,
        }
        facts |= {"options": redact_all(decisive_options(to_plain(config)))}

        files = {name: folder / "students" / f"{name}.safetensors" for name in students}

        def write_students(
            steps: Mapping[str, int], networks: Mapping[str, dict[str, Tensor]], batch_size: int
        ) -> None:
            for name, step in steps.items():
                trained = {**facts, "step": step, "batch_size": batch_size}
                save_student(
                    files[name], students[name], config.students[name], trained, networks[name]
                )

        views = TrainViews(config.views, config.seed)
        tracked = RunFacts(command, label, list(students), to_plain(config), files)
        with run_lock(folder), build_tracker(folder, config.tracker, tracked) as tracker:
            tracker.log_picture("views", partial(recipe_gallery, train, views))
            diverged, _ = fit(
                method,
                train,
                views,
                config,
                folder=folder,
                tracker=tracker,
                device=device,
                num_workers=num_workers,
                evaluate=evaluate,
                on_checkpoint=write_students,
                on_bad=None if bad_samples is None else bad_samples(train),
                epochs={
                    name: student.epochs
                    for name, student in config.students.items()
                    if student.epochs is not None
                },
            )
            if last is not None and val is not None:
                show_results(tracker, students, last, train, val)
        if diverged:
            found = ", ".join(
                f"{name} (found after step {step})" for name, step in diverged.items()
            )
            raise ValueError(
                f"{folder}: the loss of {found} was not finite; what was last good of it is in students/, the others are done. "
                "Train it with a lower optimizer.lr or with optimizer.clip_grad_norm=1"
            )
        words = data_words(decisive_options(to_plain(config)))
        log.info(
            "done: %s; next: %s",
            folder,
            shlex.join(["python", "-m", "seed_exp.knn", f"run={folder}", *words]),
        )
        with (
            distributed.rank0_first()
        ):  # only its fit has waited for students/ to be written, which all read now
            pass
        try:
            then(folder)
        except Stopped as stopped:
            if stopped.folder is None:  # an evaluation that begins anew each time
                stopped.folder, stopped.step = (
                    folder,
                    max((read_header(file) or {"step": 0})["step"] for file in files.values()),
                )
            raise
        if distributed.rank() == 0:
            write_json(folder / "done.json", {"students": list(students)})
    return folder


def build_students(config: EncoderFitConfig, embedding_dim: int) -> dict[str, Student]:
    """The students by name; each one's initial weights depend on the seed and its own name, not on the rest of the fleet.

    Raises:
        ValueError: as build_student and check_view_sizes.
    """
    students = {}
    for name, student in config.students.items():
        torch.manual_seed(derive_seed(config.seed, "weights", name))
        students[name] = build_student(student, embedding_dim)
    check_view_sizes(students, config.views)
    return students


class Evaluated(NamedTuple):
    """What an evaluation during training found; on other ranks than 0 nothing."""

    accuracies: dict[str, float]
    """{<student>/knn10: percent}; with fewer images than `knn` uses, it is only comparable within a run."""
    features: dict[str, Tensor]
    """Of the validation images [n, num_features], by student."""
    labels: Tensor
    """Of those images [n]."""
    neighbours: dict[str, Neighbours]
    """Of a few of them among the training images, by student."""


def knn_during_training(
    extract: Extractor,
    students: dict[str, Student],
    train: Source,
    val: Source,
    bank_size: int,
    query_size: int,
) -> Evaluated:
    """Top-1 of 10-NN by majority vote, in percent, on evenly spread images of both sources."""
    for student in students.values():
        student.eval()
    encoders = {name: student.features for name, student in students.items()}
    in_bank, in_queries = evenly_spaced(len(train), bank_size), evenly_spaced(len(val), query_size)
    bank, bank_labels, _ = extract(encoders, train, in_bank)
    queries, query_labels, _ = extract(encoders, val, in_queries)
    if distributed.rank() != 0:
        return Evaluated({}, {}, query_labels, {})
    k = min(10, len(bank_labels))
    shown = evenly_spaced(len(in_queries), NUM_SHOWN)
    results, neighbours = {}, {}
    for name in students:
        own_bank, own_queries = bank[name].to(extract.device), queries[name].to(extract.device)
        accuracies = knn_accuracy(
            own_bank, bank_labels, own_queries, query_labels, ks=[k], temperature=0.07
        )
        results[f"{name}/knn10"] = accuracies[f"knn{k}_majority"]
        cosines, found = nearest(own_bank, own_queries[torch.from_numpy(shown)], min(NUM_SHOWN, k))
        neighbours[name] = Neighbours(
            in_queries[shown].tolist(), in_bank[found.cpu().numpy()].tolist(), cosines.tolist()
        )
    return Evaluated(results, queries, query_labels, neighbours)


def show_results(
    tracker: Tracker, students: Mapping[str, Student], last: Evaluated, train: Source, val: Source
) -> None:
    """Gives the tracker what there is to see of the students at the end: validation images in maps and galleries, a table."""
    for name, features in last.features.items():
        tracker.log_picture(
            f"{name}/embedding_map", partial(embedding_map, features, last.labels, name)
        )
        tracker.log_picture(
            f"{name}/neighbours", partial(neighbours_gallery, val, train, last.neighbours[name])
        )
    sizes = {
        name: sum(parameter.numel() for parameter in students[name].encoder.parameters())
        for name in last.features
    }
    rows = [[name, size, last.accuracies[f"{name}/knn10"]] for name, size in sizes.items()]
    tracker.log_table("students", ["student", "parameters of the encoder", "10-NN top-1, %"], rows)


@torch.no_grad()
def check_view_sizes(students: dict[str, Student], views: ViewsConfig) -> None:
    """Passes one empty image of each size through each student.

    Raises:
        ValueError: a network does not take a size; better said now than after the data has been read.
    """
    sizes = {crop.size for crop in views.crops.values() if crop.num > 0} | {views.eval_size}
    for name, student in students.items():
        student.eval()
        for size in sorted(sizes):
            try:
                student(torch.zeros(1, 3, size, size))
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"student {name} does not take views of {size} x {size} pixels: {reason}"
                ) from None
        student.train()


def activations_per_image(
    student: Student, views: ViewsConfig, precision: Precision, device: torch.device
) -> int:
    """Bytes that autograd keeps of all views of an image until the backward pass: what makes memory grow with the batch."""
    twin = copy.deepcopy(student).to(device).train()  # its BN statistics move

    def forward() -> list[Tensor]:
        crops = [crop for crop in views.crops.values() if crop.num > 0]
        with autocast(precision, device):
            return [
                twin(torch.zeros(2 * crop.num, 3, crop.size, crop.size, device=device))
                for crop in crops
            ]

    return activation_bytes(forward) // 2


def labelled_validation(config: DataConfig) -> Source | None:
    """The validation images where there are any and they have labels."""
    try:
        source = load_source(config, "val")
    except NoValidationError:
        return None
    return None if source.labels is None else source


def init_inputs(configs: dict[str, StudentConfig]) -> dict[str, str]:
    """Fingerprints of the files that students start from."""
    files = {name: Path(config.init) for name, config in configs.items() if config.init is not None}
    return {
        f"students.{name}.init": file_hash(path) for name, path in files.items() if path.is_file()
    }
