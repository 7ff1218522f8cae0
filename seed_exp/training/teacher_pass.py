"""Passes of images through the teacher before training."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from seed_exp.config.schema import DistillConfig, OnError
from seed_exp.data.loader import load_batches
from seed_exp.data.sources import Source
from seed_exp.engine.distributed import local_device
from seed_exp.engine.run import num_workers_of
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.views.recipe import EvalViews, Views

BATCH = 64
"""Images per forward pass of the teacher; always the same, because the size changes the bits."""


def device_views(
    views: Views,
    train: Source,
    order: Sequence[tuple[int, NDArray[np.int64]]],
    config: DistillConfig,
    device: torch.device,
    title: str,
) -> Generator[dict[str, Tensor], None, None]:
    """Yields the views [V, N, 3, S, S] of each batch, by resolution, on the device.

    Training lists the images that cannot be read; here others take their places in silence, or they
    are an error, as `config.data.on_error` says. Errors as those of `load_batches`.

    Args:
        views: The recipe.
        train: The training images.
        order: Epoch and images of each batch.
        config: All options.
        device: Where the views are made.
        title: Name of the progress bar.
    """
    on_bad = (lambda _index, _error: None) if config.data.on_error is OnError.skip else None
    workers = num_workers_of(config.data)
    with closing(
        load_batches(train, views, order, num_workers=workers, device=device, on_bad=on_bad)
    ) as batches:
        for batch in tqdm(batches, title, len(order), leave=False):
            yield views.device(batch)


@torch.inference_mode()
def of_images(
    function: Callable[[Tensor], Tensor],
    teacher: Teacher,
    config: DistillConfig,
    train: Source,
    indices: NDArray[np.int64],
) -> Tensor:
    """Rows [n, D] that a function of the teacher's gives, float32 on the CPU.

    Args:
        function: Takes images [N, 3, S, S], which are evaluation views.
        teacher: Moved to the run's device and back.
        config: All options.
        train: The training images.
        indices: Numbers of images [n].
    """
    device = local_device(config.device)
    teacher.to(device)
    order = [(0, indices[start : start + BATCH]) for start in range(0, len(indices), BATCH)]
    rows, done = torch.empty(0), 0
    with closing(
        device_views(EvalViews(config.views), train, order, config, device, "teacher")
    ) as batches:
        for views in batches:
            found = function(views["global"][0])
            if not done:  # one tensor for all: parts and their concatenation need twice the memory
                rows = torch.empty(len(indices), found.shape[1])
            rows[done : done + len(found)] = found
            done += len(found)
    teacher.cpu()  # as it came: what is added to it is there too, until training moves all of it
    return rows
