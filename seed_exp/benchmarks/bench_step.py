"""Times one student's training step, from images in memory to new weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from seed_exp.base.network_names import TEACHER, trained
from seed_exp.base.registry import lookup
from seed_exp.benchmarks.measure import BenchReport, Contender, interleave, machine
from seed_exp.benchmarks.references import PlainTraining
from seed_exp.config.schema import BenchConfig, FitConfig, Precision, SeedConfig
from seed_exp.data.transfer import moved
from seed_exp.engine.distributed import local_device
from seed_exp.engine.fleet import Fleet, is_compiled
from seed_exp.engine.memory import activation_bytes
from seed_exp.engine.precision import autocast, dtype_of, resolve
from seed_exp.methods.bags import needs_bags
from seed_exp.methods.dense import dense_weight
from seed_exp.methods.objectives import OBJECTIVES
from seed_exp.methods.seed import Seed
from seed_exp.models.cost import forward_flops
from seed_exp.models.cpu_precision import chosen_formats, in_words, precisions
from seed_exp.models.students import build_student
from seed_exp.models.teachers import untrained_teacher
from seed_exp.views.recipe import HostBatch, TrainViews

IN_FLOAT32 = "precision=float32"
"""Way beside ours where networks have formats of their own, which shows what these gain."""
IMAGE_SIZE = 256
"""Side in pixels of the synthetic images from which the views are cut."""


def bench(config: BenchConfig) -> BenchReport:
    """Measures images per second of a step, and the memory it needs.

    Raises:
        ValueError: there are several students, which bench=fleet measures.
    """
    if len(config.students) > 1:
        raise ValueError(
            f"bench=step measures one student, got {', '.join(config.students)}; choose one, or "
            "bench=fleet"
        )
    (name,) = config.students
    training, num = TimedStep(config), config.batch_size
    operations, forward_backward = training.operations(name), training.forward_backward(name)
    ways = [
        Contender("plain", training.plain(name), num),
        Contender("ours", training.ours([name]), num),
        Contender("teacher forward", training.teacher_forward, num),
        Contender("student forward and backward", forward_backward, num),
        Contender(
            "as many operations in matrix products",
            training.products({precision: num * one for precision, one in operations.items()}),
            num,
        ),
    ]
    if training.has_half:
        single = training.ours([name], precision=Precision.float32)
        ways.insert(2, Contender(f"ours, {IN_FLOAT32}", single, num))
    rows = interleave(ways, seconds=config.seconds, device=training.device)
    with torch.compiler.set_stance("force_eager"):  # autograd does not see into compiled code
        kept = activation_bytes(forward_backward)
    facts = {
        "student": name,
        **training.facts(),
        "operations": f"{sum(operations.values()) / 1e9:.3g} GFLOP per image",
        "activations": (
            f"{kept / num / 2**20:.3g} MiB per image, kept by the student for its backward pass"
        ),
    }
    steps, parts = rows[:-3], rows[-3:]
    return BenchReport(
        "training step", "img/s", steps, "plain", parts, facts | machine(training.device)
    )


class TimedStep:
    """The step of `distill`, that of a plain training, and parts of it, on synthetic images.

    All use the same batch. Our step begins with crops from the host half of the views, and includes
    the device half. The plain step begins with finished float views.

    Args:
        config: Options of the bench.

    Raises:
        ValueError: the objective compares pairs of images.
    """

    def __init__(self, config: BenchConfig) -> None:
        if needs_bags(config.objective):
            raise ValueError(
                f"objective={config.objective.name} takes pairs of images, which this bench does "
                "not make; choose another objective"
            )
        if (weight := dense_weight(config.objective)) > 0:
            raise ValueError(
                f"objective.dense_weight={weight:g}: this bench compares no maps; leave it out"
            )
        self.config = config
        self.device = local_device(config.device)
        torch.manual_seed(0)
        self.plain_teacher = untrained_teacher(config.teacher, config.teacher_ssl.name)
        self.plain_teacher.adapt_to(config.views, config.teacher.size)
        self.teacher = copy.deepcopy(self.plain_teacher).to(self.device)
        if not config.objective.has_batch_teacher:
            self.teacher.fold_batch_norm()
        self.students = {
            name: build_student(student, self.teacher.embedding_dim)
            for name, student in config.students.items()
        }
        # As `distill` chooses them, whatever else is timed.
        contrast = lookup(OBJECTIVES, config.objective.name, "objective").contrast
        choices = chosen_formats(
            *(config.precision, self.device, config.views, self.students),
            teacher=config.teacher,
            objective=config.objective,
            has_keys=contrast is not None,
        )
        self.formats = precisions(choices)
        self.has_half = Precision.bfloat16 in self.formats.values()
        self.views = TrainViews(config.views, seed=0)
        self.batch = synthetic_batch(self.views, config.batch_size, self.device)
        self.float_views = {
            name: _pinned(view, self.device) for name, view in self.views.device(self.batch).items()
        }
        self.images = {
            name: view.flatten(0, 1).to(self.device, memory_format=torch.channels_last)
            for name, view in self.float_views.items()
        }

    def ours(self, names: Iterable[str], precision: Precision | None = None) -> Callable[[], None]:
        """Returns a function that makes our step on copies of these students, as one fleet.

        `precision` takes the place of that of the options, and of the formats that it chose.
        """
        students = {name: copy.deepcopy(self.students[name]) for name in names}
        options, teacher = self.config, self.teacher
        if precision is not None:
            teacher = copy.deepcopy(teacher)
            teacher.format = None
        method = Seed(students, teacher, options.objective, list(self.images), seed=0)
        method.compute_in(self.formats if precision is None else {})
        config = FitConfig(
            precision=precision or options.precision,
            compile=options.compile,
            optimizer=options.optimizer,
        )
        forever = dict.fromkeys(students, 1 << 30)
        fleet = Fleet(
            method,
            self.views,
            config,
            self.device,
            batch_size=options.batch_size,
            steps_per_epoch=1,
            num_steps=forever,
        )
        number = itertools.count()

        def step() -> None:
            fleet.step(moved(self.batch, self.device), next(number), measure=False)

        return step

    def plain(self, name: str) -> Callable[[], None]:
        """Returns a function that makes the plain step on a copy of this student."""
        config, objective = self.config, self.config.objective
        # The plain way is SEED's, whatever ours minimises.
        if not isinstance(objective, SeedConfig):
            objective = SeedConfig(queue_size=objective.queue_length)
        training = PlainTraining(
            self.students[name],
            self.plain_teacher,
            objective,
            config.optimizer,
            list(self.images),
            self.device,
        )
        return lambda: training.step(self.float_views)

    def teacher_forward(self) -> None:
        """Makes our teacher's forward pass on all views, compiled if `ours` is, which shares it."""
        with autocast(self.precision_of(TEACHER), self.device):
            for images in self.images.values():
                self.teacher(images)

    def forward_backward(self, name: str) -> Callable[[], None]:
        """Returns a function that makes a student's forward and backward pass on all views."""
        student = (
            copy.deepcopy(self.students[name])
            .to(self.device)
            .to(memory_format=torch.channels_last)
            .train()
        )
        if is_compiled(self.config, self.device):
            student.compile(dynamic=False)

        precision = self.precision_of(trained(name))

        def run() -> None:
            with autocast(precision, self.device):
                total = torch.stack(
                    [student(images).sum() for images in self.images.values()]
                ).sum()
            total.backward()  # type: ignore[no-untyped-call]
            student.zero_grad()

        return run

    def precision_of(self, network: str) -> Precision:
        """Returns the format of a network, by its name in base.network_names."""
        return self.formats.get(network, resolve(self.config.precision, self.device))

    def operations(self, name: str) -> dict[Precision, int]:
        """Returns the floating-point operations per image, by the format of the network.

        They are the teacher's forward pass, and three times the student's, because a backward pass
        counts as two forward passes.
        """
        teacher, student = self.teacher, self.students[name]
        crops = [crop for crop in self.config.views.crops.values() if crop.num > 0]
        work: dict[Precision, int] = {}
        for part, network, times in ((TEACHER, teacher, 1), (trained(name), student, 3)):
            passes = sum(crop.num * forward_flops(network, crop.size) for crop in crops)
            precision = self.precision_of(part)
            work[precision] = work.get(precision, 0) + times * passes
        return work

    def products(self, work: Mapping[Precision, int]) -> Callable[[], None]:
        """Returns a function that makes square matrix products.

        Args:
            work: About how many operations, by format.
        """
        size = 4096 if self.device.type == "cuda" else 1024
        parts: list[tuple[Tensor, Tensor, int]] = []
        for precision, operations in work.items():
            dtype = dtype_of(precision, self.device)
            matrix = torch.randn(size, size, device=self.device, dtype=dtype)
            repetitions = max(1, round(operations / (2 * size**3)))
            parts.append((matrix, torch.empty_like(matrix), repetitions))

        def run() -> None:
            for matrix, out, repetitions in parts:
                for _ in range(repetitions):
                    torch.mm(matrix, matrix, out=out)

        return run

    def facts(self) -> dict[str, str]:
        """Facts that the rates depend on, besides the machine."""
        shapes = ", ".join(f"{list(images.shape)}" for images in self.images.values())
        return {
            "teacher": self.config.teacher.name or self.config.teacher.network,
            "batch": f"{self.config.batch_size} images, views {shapes}",
            "queue": str(self.config.objective.queue_length),
            "precision": in_words(self.formats)
            if self.has_half
            else resolve(self.config.precision, self.device).value,
        }


def synthetic_batch(views: TrainViews, num: int, device: torch.device) -> HostBatch:
    """Returns a batch of `num` images of noise, as the host half gives it."""
    noise = torch.randint(0, 256, (num, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    batch = views.empty(num)
    views.host(list(noise), np.full(num, -1), 0, np.arange(num), batch)
    return batch.map(lambda tensor: _pinned(tensor, device))


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor in page-locked memory if it will be copied to a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
