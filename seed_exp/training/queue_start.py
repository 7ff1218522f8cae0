"""Queue and temperature at the start of a run, from the teacher's embeddings of its images."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.config.schema import DistillConfig, QueueInit
from seed_exp.data.order import SampleOrder
from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.engine.precision import autocast
from seed_exp.methods.seed import Seed
from seed_exp.methods.temperature import calibrated_temperature, neighbours_of
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.training.kept_state import State, is_finite, read_state, shared_state
from seed_exp.training.teacher_pass import BATCH, device_views
from seed_exp.views.recipe import TrainViews

log = logging.getLogger("seed_exp")

NUM_ROWS = 256
"""Views on which a temperature is chosen."""
FIRST_EPOCH = 2**31
"""Epoch of the first views that fill a queue: no training gets there and meets them again."""


def start_from_images(
    method: Seed,
    teacher: Teacher,
    config: DistillConfig,
    train: Source,
    device: torch.device,
    cache: Path | None,
) -> None:
    """Fills the queues and finds the temperature, as far as `config` asks for it.

    The same bits on every rank: the first one computes them, so that the number of processes
    changes nothing. Runs that share the `cache`, the folder of exactly these embeddings, compute
    them once.

    Raises:
        ValueError: as `first_embeddings` and `calibrated_temperature`.
    """
    fills = config.objective.queue_init is QueueInit.teacher
    size, neighbours = config.objective.queue_length, neighbours_of(config.objective)
    if not fills and neighbours is None:
        return
    found: float | None = None
    with distributed.rank0_first():
        if distributed.rank() == 0:
            teacher.to(device)  # where training moves it, too
            more = 0 if neighbours is None else NUM_ROWS
            make = partial(first_embeddings, teacher, config, train, device, more=more)
            if cache is None:
                embeddings = make()
            else:
                read = partial(_read, num=size + more, dim=teacher.embedding_dim, config=config)
                embeddings = shared_state(
                    cache / f"first_{size + more}.safetensors",
                    make,
                    read,
                    # After an overflow some rows are those of another format.
                    lambda state: not teacher.overflow.seen() and is_finite(state),
                )
            if fills:
                for name, rows in embeddings.items():
                    method.queues[name].enqueue(rows[:size])
            if neighbours is not None:
                rows = embeddings["global"].to(device)
                found = calibrated_temperature(rows[size:], rows[:size], neighbours)
    if fills:
        for queue in method.queues.values():
            distributed.broadcast_buffers(queue.to(device))
        log.info(
            "queue: starts with the teacher's %s embeddings of %s random images",
            f"{size:,}",
            f"{min(size, len(train)):,}",
        )
    if method.temperature is not None:
        method.temperature.value = distributed.gather_objects(found)[0]
        log.info(
            "temperature: tau_teacher=%g gives the target %g effective neighbours on average "
            "(%d images, a queue of %s)",
            *(method.temperature.value, neighbours, NUM_ROWS, f"{size:,}"),
        )


@torch.inference_mode()
def first_embeddings(
    teacher: Teacher, config: DistillConfig, train: Source, device: torch.device, *, more: int = 0
) -> dict[str, Tensor]:
    """The teacher's embeddings [K, D] of one view of K random images, by resolution, on the CPU.

    A pure function of seed, images, views and teacher. A queue with more places than there are
    images gets other views of the same images. Global views have the size with which the training
    begins. `more` embeddings follow those of the queue.

    Raises:
        ValueError: as `load_batches`.
    """
    recipe = config.views.of_size(config.views.size_at(0))
    crops = {
        name: dataclasses.replace(crop, num=min(1, crop.num)) for name, crop in recipe.crops.items()
    }
    views = TrainViews(dataclasses.replace(recipe, crops=crops), config.seed)
    order = list(_order(len(train), config.objective.queue_length + more, config.seed))
    rows: dict[str, list[Tensor]] = {}
    with closing(device_views(views, train, order, config, device, "queue")) as batches:
        for batch in batches:
            for name, view in batch.items():
                with autocast(config.precision, device):
                    # The format of the training's views, in which convolutions are faster.
                    images = view[0].contiguous(memory_format=torch.channels_last)
                    found = teacher.at_unit_length(teacher(images))
                    rows.setdefault(name, []).append(found.float().cpu())
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _read(path: Path, *, num: int, dim: int, config: DistillConfig) -> State:
    """Embeddings that `first_embeddings` made for another run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    expected = {
        name: torch.empty(num, dim, device="meta")
        for name, crop in config.views.crops.items()
        if crop.num > 0
    }
    return read_state(path, expected)


def _order(num_images: int, num: int, seed: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Epoch and images of each batch: random images, each once before any comes again."""
    order = SampleOrder(num_images, num_images, seed)
    for step in count(FIRST_EPOCH):
        epoch, images = order.batch(step)
        images = images[:num]
        for start in range(0, len(images), BATCH):
            yield epoch, images[start : start + BATCH]
        num -= len(images)
        if num == 0:
            return
