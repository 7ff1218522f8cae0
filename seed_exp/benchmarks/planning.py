"""Estimates the cost of training runs from a few of their steps, before any run is started."""

from __future__ import annotations

import itertools
import json
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from tqdm import tqdm

from seed_exp.base.table import markdown_table
from seed_exp.benchmarks.calibration import (
    DATA_BATCHES,
    DATA_IMAGES,
    Config,
    StepCost,
    adapted_teacher,
    cost_options,
    measure_step,
    rows_per_image,
    worker_rate,
)
from seed_exp.benchmarks.measure import machine
from seed_exp.config.schema import DataConfig, DistillConfig, ViewsConfig
from seed_exp.data.loader import default_num_workers
from seed_exp.data.order import SampleOrder
from seed_exp.data.sources import load_source
from seed_exp.engine.checkpoint import KEEP
from seed_exp.engine.distributed import local_device
from seed_exp.methods.dense import dense_weight, refuse_dense_cache

AUTO_BATCH_SIZE = 256
"""Images per process that the estimate assumes for batch_size=auto."""


@dataclass(frozen=True)
class Estimate:
    """Costs of a job, or of all jobs together."""

    label: str
    """Options in which the job differs from the others."""
    images_per_s: float | None
    """Images per second that one device trains on."""
    bound_by: str | None
    """The slower part, `model` or `data`; None if unknown."""
    model_images_per_s: float | None
    """Images per second of one device that never waits for data."""
    data_images_per_s: float | None
    """Images per second that the workers of one device load; None without images to measure."""
    memory: int | None
    """Bytes of memory per GPU."""
    hours: float
    """Hours on one device; on G devices at best 1/G of them."""
    checkpoints: int
    """Bytes of checkpoints and students in the run folder at the end."""
    teacher_cache: int
    """Bytes of the teacher's embeddings on disk."""


@dataclass(frozen=True)
class Plan:
    """Costs of a sweep."""

    jobs: list[Estimate]
    """Costs of each job, in the order in which the jobs were given."""
    total: Estimate
    """Sum over the jobs; a teacher cache that several jobs share counts once."""
    gpus: int
    """Number of devices that share a job."""
    device: str
    """Type of the device that was measured, `cuda` or `cpu`."""
    facts: dict[str, str]
    """Facts about the machine, and assumptions."""


class TrainingImages(NamedTuple):
    """Facts about a job's training images."""

    num: int
    """Number of images."""
    worker_rates: Mapping[int, float] | None
    """Images per second that one worker process loads, by side of global views; None if unknown."""
    problem: str | None
    """Reason why the rates are unknown; None if they are known."""

    def worker_rate(self, size: int) -> float | None:
        """The rate with global views of `size` pixels."""
        return None if self.worker_rates is None else self.worker_rates[size]


class Phase(NamedTuple):
    """The part of a run in which the same students are trained on views of the same sizes."""

    images: int
    """Images seen in the phase; an image counts each time it is seen."""
    options: Config
    """Options that the cost of a step depends on."""

    @property
    def size(self) -> int:
        """Side of the global views in pixels."""
        return self.options.views.size_at(0)


def make_plan(
    jobs: Sequence[tuple[str, Config]], *, seconds: float, num_images: int | None, gpus: int
) -> Plan:
    """Estimates the costs of every job; steps that cost the same are measured once.

    Args:
        jobs: Label and options of each job.
        seconds: Time for all measurements of steps together; a few steps of each kind are made in
            any case.
        num_images: Number of training images; None = as many as the job's data has.
        gpus: Number of devices (processes) that share a job, on one machine.

    Raises:
        ValueError: the number of images is unknown; a batch does not fit the images, the devices or
            the memory of the GPU; the jobs are for devices of different types; or a job would be
            refused, because a teacher cache cannot hold maps.
    """
    configs = [config for _, config in jobs]
    devices = {local_device(name) for name in sorted({config.device for config in configs})}
    if len(devices) > 1:
        raise ValueError("some jobs are for a GPU and some for the CPU; plan them separately")
    (device,) = devices
    images = known_images(configs, num_images)
    configs = [config.sized_for(found.num) for config, found in zip(configs, images, strict=True)]
    for config, found in zip(configs, images, strict=True):
        if (
            isinstance(config, DistillConfig)
            and config.teacher_cache
            and dense_weight(config.objective)
        ):
            refuse_dense_cache(config, adapted_teacher(config), found.num)
    phases = [
        split_into_phases(config, found.num, gpus)
        for config, found in zip(configs, images, strict=True)
    ]

    distinct = {repr(phase.options): phase.options for parts in phases for phase in parts}
    costs = {
        key: measure_step(options, device, seconds / len(distinct))
        for key, options in tqdm(distinct.items(), desc="measuring", unit="step", disable=None)
    }
    rows = [
        estimate(
            label,
            config,
            [
                (part.images, costs[repr(part.options)], found.worker_rate(part.size))
                for part in parts
            ],
            gpus,
        )
        for (label, _), config, found, parts in zip(jobs, configs, images, phases, strict=True)
    ]
    caches = {
        _cache_of(config): row.teacher_cache for config, row in zip(configs, rows, strict=True)
    }
    total = Estimate(
        *("total", None, None, None, None, None),
        hours=sum(row.hours for row in rows),
        checkpoints=sum(row.checkpoints for row in rows),
        teacher_cache=sum(caches.values()),
    )
    facts = machine(device) | _assumptions(configs, images, list(costs.values()), device, gpus)
    return Plan(rows, total, gpus, device.type, facts)


def estimate(
    label: str,
    config: Config,
    phases: Sequence[tuple[int, StepCost, float | None]],
    gpus: int,
) -> Estimate:
    """Estimates the costs of a job from its measured steps.

    Args:
        label: Options in which the job differs from the others.
        config: Options of the job.
        phases: For each phase its number of images, the cost of a step, and the images per second
            that one worker process reads, None if unknown; the first trains all students.
        gpus: Number of devices that share the job.
    """
    num_workers = (
        default_num_workers(gpus) if config.data.num_workers is None else config.data.num_workers
    )
    seen = sum(num for num, *_ in phases)
    seconds = model_seconds = sum(num / cost.images_per_s for num, cost, _ in phases)
    data_rate = None
    workers = max(1, num_workers) / rows_per_image(config)
    rated = [(num, cost, rate * workers) for num, cost, rate in phases if rate is not None]
    if rated:
        data_seconds = sum(num / rate for num, _, rate in rated)
        data_rate = seen / data_seconds
        if num_workers == 0:  # the training process loads and trains in turn
            seconds = model_seconds + data_seconds
        else:
            seconds = sum(num / min(cost.images_per_s, rate) for num, cost, rate in rated)
    model_rate, first = seen / model_seconds, phases[0][1]
    return Estimate(
        label=label,
        images_per_s=seen / seconds,
        bound_by=None if data_rate is None else "data" if data_rate < model_rate else "model",
        model_images_per_s=model_rate,
        data_images_per_s=data_rate,
        memory=max(cost.memory for _, cost, _ in phases),
        hours=seconds / 3600,
        checkpoints=KEEP * first.checkpoint + first.students,
        teacher_cache=seen * first.cached if _cache_of(config) else 0,
    )


def split_into_phases(config: Config, num_images: int, gpus: int) -> list[Phase]:
    """Splits a run into phases.

    Some students may be trained for fewer epochs than others, and views may change their size.
    Steps of one size count as one phase even where they do not follow one another.

    Raises:
        ValueError: the batch does not fit the images, the devices or the accumulation.
    """
    batch_size = config.batch_size if isinstance(config.batch_size, int) else AUTO_BATCH_SIZE * gpus
    order = SampleOrder(num_images, batch_size, config.seed, world_size=gpus)
    if order.batch_size_per_rank % config.accumulation:
        raise ValueError(
            f"accumulation={config.accumulation} does not divide the {order.batch_size_per_rank} "
            "images of each process"
        )
    epochs = {name: student.epochs or config.epochs for name, student in config.students.items()}
    steps = {name: config.steps or num * order.steps_per_epoch for name, num in epochs.items()}
    phases = []
    for begin, end in itertools.pairwise([0, *sorted(set(steps.values()))]):
        students = [name for name, num in steps.items() if num >= end]
        for size, num in _steps_of_sizes(config, begin, end, order.steps_per_epoch).items():
            views = config.views
            if (
                views.resolution is not None
            ):  # views.crops.global.size stays: teacher.size is for it
                views = replace(views, resolution=[[0, size]])
            sized = replace(config, views=views)
            phases.append(
                Phase(num * batch_size, cost_options(sized, order.batch_size_per_rank, students))
            )
    return phases


def _steps_of_sizes(config: Config, begin: int, end: int, steps_per_epoch: int) -> dict[int, int]:
    """Number of steps from `begin` to `end` with each side of global views.

    In a run that counts in epochs, both are where an epoch ends.
    """
    if config.views.resolution is None:
        return {config.views.size_at(0): end - begin}
    length = 1 if config.steps else steps_per_epoch
    counted = Counter(map(config.views.size_at, range(begin // length, end // length)))
    return {size: num * length for size, num in counted.items()}


def known_images(configs: Sequence[Config], num: int | None) -> list[TrainingImages]:
    """Returns facts about each job's training images.

    The same views of the same images are measured once.

    Raises:
        ValueError: the images cannot be read, and `num` is None.
    """
    known: dict[str, TrainingImages] = {}
    for config in configs:
        key = repr((config.data, config.views))
        if key not in known:
            known[key] = _images(config.data, config.views, num)
    return [known[repr((config.data, config.views))] for config in configs]


def _images(data: DataConfig, views: ViewsConfig, num: int | None) -> TrainingImages:
    try:
        source = load_source(replace(data, download=False), "train")
    except (OSError, ValueError) as error:
        if num is None:
            raise ValueError(
                f"{error}; without the images, give their number: --images N"
            ) from None
        return TrainingImages(num, None, str(error))
    rates = {size: worker_rate(source, views.of_size(size)) for size in views.global_sizes}
    return TrainingImages(num or len(source), rates, None)


def _cache_of(config: Config) -> str | None:
    return config.teacher_cache if isinstance(config, DistillConfig) else None


def _assumptions(
    configs: Sequence[Config],
    images: Sequence[TrainingImages],
    costs: Sequence[StepCost],
    device: torch.device,
    gpus: int,
) -> dict[str, str]:
    """Facts and assumptions on which the numbers rest, besides the machine."""
    facts = {"images": _listed({found.num for found in images})}
    if precisions := sorted({cost.precision for cost in costs} - {""}):
        facts["precision"] = "; or ".join(precisions)
    if device.type == "cpu":
        measured = _listed({cost.measured_images for cost in costs})
        facts["rates"] = (
            f"measured with {measured} images per step, and the same assumed at the real batch size"
        )
        facts["GPU memory"] = (
            "estimated: what autograd keeps of the batch in a GPU's precision, weights, gradients, "
            "momentum, averages, teacher, queues; work space comes on top"
        )
    if any(config.batch_size == "auto" for config in configs):
        facts["batch_size=auto"] = f"taken for {AUTO_BATCH_SIZE} images per device"
    if gpus > 1:
        facts["devices"] = (
            f"{gpus} share a job and this machine's CPU cores, and scale perfectly; rates and "
            "memory are of one"
        )
    if any(config.views.resolution for config in configs):
        facts["views.resolution"] = (
            "each size was measured; rates are means over the run, memory is the largest size's"
        )
    if any(found.worker_rates for found in images):
        facts["data"] = (
            f"a worker process was measured on {DATA_IMAGES * (DATA_BATCHES - 1)} images, times "
            "the workers"
        )
    if problems := sorted({found.problem for found in images if found.problem}):
        facts["data not measured"] = "; ".join(problems)
    facts["checkpoints"] = f"{KEEP} are kept, beside the students' own files"
    facts["not in the hours"] = "start-up, compilation, evaluation, writing of checkpoints"
    return facts


def render(plan: Plan, width: int | None = None) -> str:
    """Returns the plan as Markdown: a row per job, a row for all jobs, then the assumptions.

    Args:
        plan: What to show.
        width: Characters per line of the tables, where they can be had: columns without numbers are
            left out, letters stand for the jobs, and there are several tables. None = one table.
    """
    unit, about = ("GPU", "") if plan.device == "cuda" else ("CPU", "~")
    columns: dict[str, Callable[[Estimate], str]] = {
        "job": lambda row: row.label,
        "img/s": lambda row: _number(row.images_per_s),
        "bound by": lambda row: row.bound_by or "",
        "model img/s": lambda row: _number(row.model_images_per_s),
        "data img/s": lambda row: _number(row.data_images_per_s),
        "GPU memory": lambda row: _number(row.memory, 2**30, f"{about}{{}} GiB"),
        f"{unit}-hours": lambda row: _number(row.hours),
    }
    if plan.gpus > 1:
        columns[f"hours on {plan.gpus}"] = lambda row: _number(row.hours, plan.gpus)
    columns["checkpoints"] = lambda row: _number(row.checkpoints, 10**9, "{} GB")
    if plan.total.teacher_cache:
        columns["teacher cache"] = lambda row: _number(row.teacher_cache or None, 10**9, "{} GB")
    rows = [*plan.jobs, plan.total]
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    facts = [f"- {name}: {value}" for name, value in plan.facts.items()]
    table = _table(cells)
    if width is None or _width(table) <= width:
        return "\n".join([table, "", *facts])
    letters = [*itertools.islice(_letters(), len(plan.jobs)), plan.total.label]
    jobs = [f"- {letter}: {row.label}" for letter, row in zip(letters, plan.jobs, strict=False)]
    cells["job"] = letters
    shown = {name: column for name, column in cells.items() if any(column)}
    return "\n".join([*_tables(shown, width), "", *jobs, *facts])


def _tables(cells: Mapping[str, list[str]], width: int) -> list[str]:
    """Tables of at most this width where possible, each with the first column."""
    (name, column), *others = cells.items()
    part, tables = {name: column}, []
    for other, numbers in others:
        if len(part) > 1 and _width(_table({**part, other: numbers})) > width:
            tables += [_table(part), ""]
            part = {name: column}
        part[other] = numbers
    return [*tables, _table(part)]


def _table(cells: Mapping[str, list[str]]) -> str:
    return markdown_table(list(cells), [list(row) for row in zip(*cells.values(), strict=True)])


def _width(table: str) -> int:
    return max(map(len, table.splitlines()))


def _letters() -> Iterator[str]:
    """A, B, ..., Z, AA, AB, ..."""
    for length in itertools.count(1):
        for word in itertools.product(string.ascii_uppercase, repeat=length):
            yield "".join(word)


def to_json(plan: Plan) -> str:
    """Returns the plan as one JSON object: its fields."""
    return json.dumps(asdict(plan), indent=2)


def _number(value: float | None, unit: int = 1, form: str = "{}") -> str:
    """Returns `value / unit` with three digits, or as a whole number from 100; "" for None."""
    if value is None:
        return ""
    return form.format(f"{value / unit:,.0f}" if value / unit >= 100 else f"{value / unit:.3g}")


def _listed(numbers: set[int]) -> str:
    return ", ".join(f"{number:,}" for number in sorted(numbers))
