"""Training of encoders in an open run, whatever the method."""

from __future__ import annotations

import copy
import logging
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from seed_exp.base.announcement import announce
from seed_exp.base.average_names import average_of, is_average, network_behind
from seed_exp.base.files import file_hash, write_json
from seed_exp.base.redaction import redact_all
from seed_exp.base.stopping import Stopped
from seed_exp.config.options import decisive_options, to_plain
from seed_exp.config.schema import (
    DataConfig,
    EncoderFitConfig,
    Precision,
    StudentConfig,
    ViewsConfig,
)
from seed_exp.config.words import word
from seed_exp.data.loader import cores_of_rank
from seed_exp.data.sources import NoValidationError, Source, load_source
from seed_exp.engine import distributed
from seed_exp.engine.averages import Averages
from seed_exp.engine.fit import fit
from seed_exp.engine.fleet import derive_seed
from seed_exp.engine.memory import activation_bytes, available_memory
from seed_exp.engine.method import Method
from seed_exp.engine.precision import autocast
from seed_exp.engine.run import Run
from seed_exp.evaluation.setup import eval_options
from seed_exp.models.encoders import patch_advice
from seed_exp.models.student_header import read_header
from seed_exp.models.students import Student, build_student, save_student
from seed_exp.models.trial import features_of_empty_image
from seed_exp.protocols.follow_up import PlannedEvaluation, run_evaluations
from seed_exp.reporting.image_grids import recipe_gallery
from seed_exp.training.monitor import Monitor
from seed_exp.views.recipe import TrainViews

log = logging.getLogger("seed_exp")


class EncoderImages(NamedTuple):
    """Images to train encoders with."""

    train: Source
    val: Source | None
    """Validation images with labels; None where there are none."""

    @property
    def have_labels(self) -> bool:
        """Whether students can be evaluated on these images."""
        return (
            self.val is not None
            and self.train.labels is not None
            and self.val.labels is not None
            and min(int(self.train.labels.min()), int(self.val.labels.min())) >= 0
        )


def train_encoders(
    run: Run[EncoderFitConfig],
    method: Method,
    students: Mapping[str, Student],
    images: EncoderImages,
) -> dict[str, int]:
    """Trains the students in place, from the start or from where the run folder is.

    Leaves students/<name>.safetensors, metrics.jsonl and checkpoints/ in the run folder, and with
    `ema_decay` students/<name>_ema.safetensors.

    Args:
        run: Where they train.
        method: What trains them.
        students: By name.
        images: Training images, and others for the k-NN evaluation during training.

    Returns:
        The students that diverged, and after which step that was found.

    Raises:
        ValueError: as `fit`.
        Stopped: as `fit`.
    """
    config = run.config
    if distributed.rank() == 0:
        announce(run.folder)
    log.info("%d images", len(images.train))
    describe(students, config, run.device, method.formats)
    if run.device.type == "cpu":
        log.info(
            "CPU: torch threads %d, worker processes %d, cores %d; where other work "
            "shares them, fewer threads (OMP_NUM_THREADS) are faster",
            *(torch.get_num_threads(), run.num_workers),
            cores_of_rank(distributed.local_world_size()),
        )
    averages = None
    if config.ema_decay is not None:
        averages = Averages(students, config.ema_decay, run.device)
    monitor = Monitor(run, students, averages.networks if averages else {}, *images)
    if not monitor.has_labels:
        log.info("no labelled validation images: no k-NN evaluation during training")

    files = {name: student_file(run.folder, name) for name in students}
    facts = {
        "command": run.command,
        "eval_views": eval_options(config.views),
        "inputs": run.inputs,
        "options": redact_all(decisive_options(to_plain(config))),
    }

    def write_students(
        steps: Mapping[str, int], networks: Mapping[str, dict[str, Tensor]], batch_size: int
    ) -> None:
        for name, step in steps.items():
            owner = network_behind(name, students)
            trained = {**facts, "step": step, "batch_size": batch_size, **method.found()}
            if owner != name:
                trained["ema_decay"] = config.ema_decay
            path, options = student_file(run.folder, name), config.students[owner]
            save_student(path, students[owner], options, trained, networks[name])

    views = TrainViews(config.views, config.seed)
    epochs = {name: student.epochs for name, student in config.students.items()}
    with run.tracked(list(students), files) as tracker:
        tracker.log_picture("views", partial(recipe_gallery, images.train, views))
        diverged, _ = fit(
            method,
            images.train,
            views,
            run,
            evaluate=monitor.evaluate,
            on_checkpoint=write_students,
            epochs={name: num for name, num in epochs.items() if num is not None},
            averages=averages,
        )
        monitor.show(tracker, diverged)
    return diverged


def finish(
    run: Run[EncoderFitConfig],
    students: Sequence[str],
    evaluations: Sequence[PlannedEvaluation],
    diverged: Mapping[str, int],
    images: EncoderImages,
) -> None:
    """Evaluates the students that have not diverged; if that is all of them, writes done.json.

    Args:
        run: Where they were trained.
        students: Names.
        evaluations: Evaluations that follow.
        diverged: Students that diverged, and after which step that was found.
        images: Images of the training.

    Raises:
        ValueError: students diverged (the others are done); or as `run_evaluations`.
        Stopped: a signal ended an evaluation; the same command goes on there.
    """
    of_run = word("run", str(run.folder))  # they know the run's images and views
    following = [
        shlex.join(["python", "-m", f"seed_exp.{command}", of_run])
        for command in (("knn",) if images.have_labels else ("embed", "export"))
    ]
    log.info("done: %s; next: %s", run.folder, " or ".join(following))
    with distributed.rank0_first():
        pass  # only rank 0's fit has waited for students/ to be written, which all read now
    try:
        without = [*diverged, *map(average_of, diverged)]
        run_evaluations(evaluations, run.folder, without)
    except Stopped as stopped:
        if stopped.folder is None:  # an evaluation that begins anew each time
            headers = [read_header(student_file(run.folder, name)) for name in students]
            stopped.folder = run.folder
            stopped.step = max((header or {"step": 0})["step"] for header in headers)
        raise
    if diverged:
        found = ", ".join(f"{name} (found after step {step})" for name, step in diverged.items())
        raise ValueError(
            f"{run.folder}: {found} diverged, as log.txt says; students/ has it as of its last "
            "checkpoint, the others are done. Train it with a lower optimizer.lr or with "
            "optimizer.clip_grad_norm=1"
        )
    if distributed.rank() == 0:
        write_json(run.folder / "done.json", {"students": list(students)})


def student_file(folder: Path, name: str) -> Path:
    """The file in a run folder in which checkpoints leave a student."""
    return folder / "students" / f"{name}.safetensors"


def describe(
    students: Mapping[str, Student],
    config: EncoderFitConfig,
    device: torch.device,
    formats: Mapping[str, Precision],
) -> None:
    """Logs size and memory of each student; `formats` as those of `Method`."""
    for name, student in students.items():
        num_parameters = sum(parameter.numel() for parameter in student.parameters())
        precision = formats.get(name, config.precision)
        activations = activations_per_image(student, config.views, precision, device)
        log.info(
            "student %s: %s parameters with its head, %.3g MiB of activations per image",
            name,
            f"{num_parameters:,}",
            activations / 2**20,
        )


def load_images(config: DataConfig) -> EncoderImages:
    """Training images and, where there are any with labels, validation images.

    Errors as `load_source`.
    """
    return EncoderImages(load_source(config, "train"), labelled_validation(config))


def labelled_validation(config: DataConfig) -> Source | None:
    """The validation images where there are any and they have labels."""
    try:
        source = load_source(config, "val")
    except NoValidationError:
        return None
    return None if source.labels is None else source


def refuse_large_queue(option: str, size: int, dim: int, num_queues: int) -> None:
    """Checks that the queues fit into memory, before they are made.

    Args:
        option: Option that gives the size.
        size: Embeddings in a queue.
        dim: Numbers in an embedding.
        num_queues: Queues of the run.

    Raises:
        ValueError: they do not.
    """
    try:
        free = available_memory(torch.device("cpu"))
    except ValueError:  # the system does not say
        return
    # One more, because the first embeddings are drawn before they are normalised.
    needed = 4 * size * dim * (num_queues + 1)
    if needed > free:
        raise ValueError(
            f"{option}={size} needs {needed / 2**30:,.1f} GiB ({num_queues} queues of {size:,} "
            f"embeddings of {dim} numbers), and {free / 2**30:,.1f} GiB of memory are free; choose "
            "a smaller one, such as SEED's 65536"
        )


def build_students(config: EncoderFitConfig, embedding_dim: int) -> dict[str, Student]:
    """The students by name.

    Each one's initial weights depend on the seed and its own name, not on the rest of the fleet.

    Raises:
        ValueError: a student does not fit into memory, or has the name of another one's average;
            or as build_student and check_view_sizes.
    """
    refuse_names_of_averages(config)
    students = {}
    for name, student in config.students.items():
        torch.manual_seed(derive_seed(config.seed, "weights", name))
        try:
            students[name] = build_student(student, embedding_dim)
        except RuntimeError as error:
            if "allocate" not in str(error):
                raise
            raise ValueError(
                f"students.{name} does not fit into memory with hidden_dim={student.hidden_dim} "
                f"and embeddings of {embedding_dim} numbers; choose smaller ones"
            ) from None
    check_view_sizes(students, config.views)
    return students


def refuse_names_of_averages(config: EncoderFitConfig) -> None:
    """Checks that no student is called as another one's average will be.

    Raises:
        ValueError: one is.
    """
    for name in config.students:
        if config.ema_decay is not None and is_average(name, config.students):
            raise ValueError(
                f"the student {name} has the name of the average of another one, which ema_decay="
                f"{config.ema_decay:g} makes; give it another name, or leave ema_decay out"
            )


def check_view_sizes(students: dict[str, Student], views: ViewsConfig) -> None:
    """Passes one empty image of each size through each student.

    Raises:
        ValueError: a network does not take a size, or returns something else than features.
    """
    for name, student in students.items():
        for size in sorted({*views.sizes, views.eval_size}):
            advice = patch_advice(student.encoder, size, f"students.{name}.args")
            features_of_empty_image(
                student.encoder, size, f"student {name}", student.num_features, advice
            )


def activations_per_image(
    student: Student, views: ViewsConfig, precision: Precision, device: torch.device
) -> int:
    """Bytes that autograd keeps of all views of an image until the backward pass.

    They make memory grow with the batch. Where views change their size, those of the largest.
    """
    twin = copy.deepcopy(student).to(device).train()  # its BN statistics move

    def forward() -> list[Tensor]:
        crops = [crop for crop in views.largest().crops.values() if crop.num > 0]
        with autocast(precision, device):
            return [
                twin(
                    torch.zeros(2 * crop.num, 3, crop.size, crop.size, device=device),
                    with_map=twin.map_head is not None,
                )
                for crop in crops
            ]

    return activation_bytes(forward) // 2


def student_inputs(
    configs: Mapping[str, StudentConfig], students: Mapping[str, Student]
) -> dict[str, str]:
    """Fingerprints of the files and pretrained weights that students start from, and of their code.

    Args:
        configs: Options of the students, by name.
        students: The students made by them.
    """
    files = {name: Path(config.init) for name, config in configs.items() if config.init is not None}
    return {
        f"students.{name}.init": file_hash(path) for name, path in files.items() if path.is_file()
    } | {
        f"students.{name}.{option}": fingerprint
        for name, student in students.items()
        for option, fingerprint in student.fingerprints.items()
    }
