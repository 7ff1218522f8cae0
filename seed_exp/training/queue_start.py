"""The queue at the start of a run: filled with the teacher's embeddings, and of a fitting size."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.config.schema import DistillConfig, PairwiseConfig, QueueInit
from seed_exp.data.order import SampleOrder
from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.engine.precision import autocast
from seed_exp.methods.queue import Queue
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.training.teacher_pass import BATCH, device_views
from seed_exp.views.recipe import TrainViews

log = logging.getLogger("seed_exp")

FIRST_EPOCH = 2**31
"""Epoch of the first views that fill a queue: no training gets there and meets them again."""


def queue_advice(config: DistillConfig, num_images: int, embedding_dim: int) -> list[str]:
    """A sentence for each way in which the queue's size does not fit the run, with the remedy.

    Args:
        config: All options.
        num_images: Training images.
        embedding_dim: Width of an embedding.
    """
    size, advice = config.objective.queue_size, []
    smaller = f"objective.queue_size={2 ** (num_images.bit_length() - 1)}"
    if size > num_images:
        num_queues = sum(crop.num > 0 for crop in config.views.crops.values())
        advice.append(
            f"the queue is larger than the data: its {size:,} embeddings are of {num_images:,} "
            f"images, and each checkpoint has {size * embedding_dim * 4 * num_queues / 1e6:,.0f} "
            f"MB of them; {smaller} holds each image once"
        )
    if isinstance(config.batch_size, int):
        num_steps = config.steps or config.epochs * (num_images // config.batch_size)
        seen = num_steps * config.batch_size
        is_compared = not isinstance(config.objective, PairwiseConfig)
        if config.objective.queue_init is QueueInit.random and is_compared and seen < size:
            smallest = smaller if size > num_images else "a smaller objective.queue_size"
            advice.append(
                f"the queue is never filled: the run puts {seen:,} embeddings into it, the other "
                f"{size - seen:,} stay random vectors, which no image resembles; "
                f"choose {smallest}, or objective.queue_init=teacher"
            )
    return advice


def start_queues(
    queues: Mapping[str, Queue],
    teacher: Teacher,
    config: DistillConfig,
    train: Source,
    device: torch.device,
) -> None:
    """Fills the queues with `first_embeddings`, the same bits on every rank; errors as these.

    The first rank computes them, so that the number of processes changes nothing.
    """
    with distributed.rank0_first():
        if distributed.rank() == 0:
            teacher.to(device)  # where training moves it, too
            for name, embeddings in first_embeddings(teacher, config, train, device).items():
                queues[name].enqueue(embeddings)
    for queue in queues.values():
        distributed.broadcast_buffers(queue.to(device))
    log.info(
        "queue: starts with the teacher's %s embeddings of %s random images",
        f"{config.objective.queue_size:,}",
        f"{min(config.objective.queue_size, len(train)):,}",
    )


@torch.inference_mode()
def first_embeddings(
    teacher: Teacher, config: DistillConfig, train: Source, device: torch.device
) -> dict[str, Tensor]:
    """The teacher's embeddings [K, D] of one view of K random images, by resolution, on the CPU.

    A pure function of seed, images, views and teacher. A queue with more places than there are
    images gets other views of the same images.

    Raises:
        ValueError: as `load_batches`.
    """
    crops = {
        name: dataclasses.replace(crop, num=min(1, crop.num))
        for name, crop in config.views.crops.items()
    }
    views = TrainViews(dataclasses.replace(config.views, crops=crops), config.seed)
    order = list(_order(len(train), config.objective.queue_size, config.seed))
    rows: dict[str, list[Tensor]] = {}
    with closing(device_views(views, train, order, config, device, "queue")) as batches:
        for batch in batches:
            for name, view in batch.items():
                with autocast(config.precision, device):
                    rows.setdefault(name, []).append(teacher(view[0]).float().cpu())
    return {name: torch.cat(parts) for name, parts in rows.items()}


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
