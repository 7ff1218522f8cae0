"""Measures a training step and a worker process on this machine.

No checkpoints are needed, and few images or none.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from seed_exp.benchmarks.measure import Contender, interleave
from seed_exp.config.schema import (
    DistillConfig,
    MocoConfig,
    OptimizerConfig,
    Precision,
    PretrainConfig,
    TeacherConfig,
    ViewsConfig,
)
from seed_exp.data.loader import load_batches
from seed_exp.data.order import SampleOrder
from seed_exp.data.sources import Source
from seed_exp.data.transfer import moved
from seed_exp.engine.averages import Averages
from seed_exp.engine.fleet import Fleet
from seed_exp.engine.memory import activation_bytes
from seed_exp.engine.precision import resolve
from seed_exp.methods.bags import BagSeed, any_bags, needs_bags
from seed_exp.methods.dense import dense_term, dense_weight
from seed_exp.methods.moco import Moco
from seed_exp.methods.seed import Seed
from seed_exp.methods.temperature import neighbours_of
from seed_exp.models.cpu_precision import (
    LOWEST_TEMPERATURE,
    Choice,
    chosen_formats,
    in_words,
    obstacle_of_teacher,
    precisions,
)
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.students import build_student
from seed_exp.models.teachers import TEACHERS, untrained_teacher
from seed_exp.views.recipe import HostBatch, TrainViews

Config = DistillConfig | PretrainConfig

_FEW_IMAGES = 4  # images of the first step on a CPU, where the real batch may take minutes
_CPU_STEPS = 10  # steps on a CPU that should fit into the time for measuring
DATA_IMAGES, DATA_BATCHES = 16, 5
"""Images per batch with which a worker is timed, and number of batches; the first is not timed."""
_NOISE_SIZE = 256  # side in pixels of the images from which the views are cut
_ENDLESS = 1 << 60


@dataclass(frozen=True)
class StepCost:
    """Costs of training, for one process."""

    images_per_s: float
    """Images per second that the process trains on."""
    measured_images: int
    """Images in each measured step; on a CPU they may be fewer than the run will have."""
    memory: int
    """Bytes of GPU memory at the peak."""
    checkpoint: int
    """Bytes of a checkpoint."""
    students: int
    """Bytes of the students' weights and of their averages."""
    cached: int
    """Bytes that a teacher cache needs per image and epoch; 0 without a teacher."""
    precision: str = ""
    """Formats in which the networks compute, in words."""


def cost_options(config: Config, batch_size: int, students: Sequence[str]) -> Config:
    """Returns the options that a step's cost depends on, with all others at fixed values.

    So runs with equal results cost the same per step.

    Args:
        config: All options of a run.
        batch_size: Images per step in one process.
        students: Names of the students that are trained.
    """
    options: dict[str, Any] = {
        "students": {
            name: replace(config.students[name], init=None, epochs=None) for name in students
        },
        "views": config.views,
        "optimizer": OptimizerConfig(
            config.optimizer.name,
            lr=1.0,
            momentum=config.optimizer.momentum,
            clip_grad_norm=config.optimizer.clip_grad_norm,
        ),
        "batch_size": batch_size,
        "accumulation": config.accumulation,
        "precision": config.precision,
        "compile": config.compile,
        "ema_decay": None if config.ema_decay is None else 0.5,
    }
    if isinstance(config, PretrainConfig):
        moco = MocoConfig(queue_size=config.moco.queue_length)
        return PretrainConfig(**options, embedding_dim=config.embedding_dim, moco=moco)
    names = {field.name for field in fields(config.objective)}
    any_value = names & {"tau_student", "tau_teacher", "weight", "smooth_share"}
    if dense_weight(config.objective) > 0:
        any_value.add("dense_weight")
    if neighbours_of(config.objective) is not None:  # which choose it
        any_value.remove("tau_teacher")
    # Only whether a temperature lets the teacher compute in bfloat16 on a CPU matters.
    lowered = obstacle_of_teacher(config.teacher, config.objective) is not None
    factors: dict[str, Any] = dict.fromkeys(any_value, 1.0)
    for option in any_value & {"tau_student", "tau_teacher"}:
        factors[option] = LOWEST_TEMPERATURE / 2 if lowered else 1.0
    objective = replace(config.objective, **factors)
    return DistillConfig(
        **options,
        teacher=_published_equivalent(config.teacher),
        teacher_ssl=config.teacher_ssl,
        objective=objective,
    )


def _published_equivalent(teacher: TeacherConfig) -> TeacherConfig:
    """Returns the first published teacher with the same network and head.

    A network of our own is returned as it is.
    """
    shapes = {
        name: (spec.network, spec.hidden_dim, spec.head, spec.embedding_dim)
        for name, spec in TEACHERS.items()
    }
    if teacher.network not in shapes or TEACHERS[teacher.network].network is None:
        return teacher
    first = next(name for name, shape in shapes.items() if shape == shapes[teacher.network])
    return TeacherConfig(
        first,
        size=teacher.size,
        embedding=teacher.embedding,
        reduce=teacher.reduce,
        embedding_dim=teacher.embedding_dim,
    )


def measure_step(config: Config, device: torch.device, seconds: float) -> StepCost:
    """Measures training steps on images of noise, with random weights.

    On a GPU a step has as many images as in the run. On a CPU it has as many as the time allows,
    and the memory is an estimate.

    Args:
        config: Options from `cost_options`.
        device: Device on which to make the steps.
        seconds: Time to measure, at least; a few steps are made in any case.

    Raises:
        ValueError: a step does not fit into the memory of the GPU.
    """
    assert isinstance(config.batch_size, int)
    method, num = _build(config), config.batch_size
    formats = precisions(_formats(method, config, device))
    is_mixed = Precision.bfloat16 in formats.values()
    precision = in_words(formats) if is_mixed else resolve(config.precision, device).value
    if device.type == "cpu":
        part, config = config.batch_size // config.accumulation, replace(config, accumulation=1)
        few = min(part, _FEW_IMAGES)
        memory = _memory_on_gpu(method, config, few, part)
        method.compute_in(formats)
        _, step = _stepper(method, config, device, few)
        begin = time.perf_counter()
        step()
        seconds_per_image = (time.perf_counter() - begin) / few
        num = min(part, max(few, int(seconds / _CPU_STEPS / seconds_per_image)))

    fleet, step = _stepper(method, config, device, num)
    try:
        (row,) = interleave([Contender("step", step, num)], seconds=seconds, device=device)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"a step of {num} images with {', '.join(config.students)} does not fit into the "
            f"memory of {device}; use more GPUs or a larger accumulation"
        ) from None
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    state, cached = fleet.state(), 0
    if isinstance(method, Seed):  # a checksum and the embedding of each view, methods.teacher_cache
        cached = 4 * (
            1 + method.teacher.embedding_dim * sum(crop.num for crop in config.views.crops.values())
        )
    students = _bytes([state["networks"], state.get("averages", {})])
    return StepCost(row.rate, num, memory, _bytes(state), students, cached, precision)


def _formats(method: Seed | Moco, config: Config, device: torch.device) -> dict[str, Choice]:
    """The formats that the command would choose on this CPU."""
    parts = (config.precision, device, config.views, method.trainable)
    if isinstance(config, PretrainConfig):
        return chosen_formats(*parts, has_keys=True)
    return chosen_formats(
        *parts,
        teacher=config.teacher,
        objective=config.objective,
        has_keys=method.contrast is not None,
    )


def rows_per_image(config: Config) -> int:
    """Images that are read for each image of a step: with bags, one of its bag besides."""
    return 2 if isinstance(config, DistillConfig) and needs_bags(config.objective) else 1


def _memory_on_gpu(method: Seed | Moco, config: Config, few: int, num: int) -> int:
    """Estimates the bytes that a step with `num` images needs on a GPU.

    The estimate is made from a step with `few` images on the CPU.
    """
    as_on_gpu = replace(config, precision=resolve(config.precision, torch.device("cuda")))
    fleet, step = _stepper(method, as_on_gpu, torch.device("cpu"), few)
    activations = activation_bytes(step)
    state = fleet.state()
    # Gradients are as large as the parameters.
    gradients = [list(network.parameters()) for network in method.trainable.values()]
    return (
        _bytes([state["networks"], state["optimizers"], gradients, method.state_dict()])
        + _bytes(state.get("averages", {}))
        + activations * num // few
    )


def worker_rate(source: Source, views: ViewsConfig) -> float:
    """Measures the images per second that one worker process reads, decodes and crops."""
    order = SampleOrder(len(source), min(DATA_IMAGES, len(source)), seed=0)
    with closing(
        load_batches(
            source, TrainViews(views, 0), map(order.batch, range(DATA_BATCHES)), num_workers=1
        )
    ) as batches:
        next(batches)
        begin = time.perf_counter()
        num = sum(len(batch.labels) for batch in batches)
        return num / (time.perf_counter() - begin)


def _build(config: Config) -> Seed | Moco:
    """Builds the method that the command trains, with random weights: nothing is downloaded."""
    if isinstance(config, PretrainConfig):
        students = {
            name: build_student(student, config.embedding_dim)
            for name, student in config.students.items()
        }
        return Moco(students, config.moco, seed=0)
    teacher = adapted_teacher(config)
    if not config.objective.has_batch_teacher:
        teacher.fold_batch_norm()
    students = {
        name: build_student(student, teacher.embedding_dim)
        for name, student in config.students.items()
    }
    resolutions = [name for name, crop in config.views.crops.items() if crop.num > 0]
    parts = (students, teacher, config.objective, resolutions, 0)
    if needs_bags(config.objective):
        return BagSeed(*parts, bags=any_bags(2, 1))
    whole = config.views.resolution is None  # otherwise a phase of the run
    dense = dense_term(config.objective, students, teacher, config.views, seed=0, is_whole=whole)
    return Seed(*parts, dense=dense)


def adapted_teacher(config: DistillConfig) -> Teacher:
    """Returns the teacher with random weights, ready for the run's views."""
    teacher = untrained_teacher(config.teacher, config.teacher_ssl.name)
    teacher.adapt_to(config.views, config.teacher.size)
    return teacher


def _stepper(
    method: Seed | Moco, config: Config, device: torch.device, num: int
) -> tuple[Fleet, Callable[[], Any]]:
    """Returns a fleet that trains the method, and a function that makes one step of it.

    Every step has the same `num` images.
    """
    views = TrainViews(config.views, seed=0)
    batch = moved(_noise(views, num * method.rows_per_image), device)
    lengths = dict.fromkeys(method.trainable, _ENDLESS)
    averages = None
    if config.ema_decay is not None:
        averages = Averages(method.trainable, config.ema_decay, device)
    fleet = Fleet(
        method,
        views,
        config,
        device,
        batch_size=num,
        steps_per_epoch=_ENDLESS,
        num_steps=lengths,
        averages=averages,
    )
    number = itertools.count()
    return fleet, lambda: fleet.step(batch, next(number), measure=False)


def _noise(views: TrainViews, num: int) -> HostBatch:
    """Returns a batch of `num` images of noise, as the host half gives it."""
    batch = views.empty(num)
    images = torch.randint(0, 256, (num, 3, _NOISE_SIZE, _NOISE_SIZE), dtype=torch.uint8)
    views.host(list(images), np.full(num, -1), 0, np.arange(num), batch)
    return batch


def _bytes(state: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
