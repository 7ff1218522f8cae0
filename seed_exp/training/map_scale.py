"""The fixed scale of the teacher's maps, fitted before training and kept in checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from seed_exp.config.schema import DistillConfig
from seed_exp.data.sources import Source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine import distributed
from seed_exp.methods.dense import DenseTerm
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.reduction import inverse_std
from seed_exp.training.kept_state import State, cached_state, read_state
from seed_exp.training.teacher_pass import of_images
from seed_exp.training.teacher_reduction import sample_key

log = logging.getLogger("seed_exp")


def fit_map_scale(
    term: DenseTerm, teacher: Teacher, config: DistillConfig, train: Source, device: torch.device
) -> None:
    """Sets mean and standard deviation of each channel of the teacher's maps, on every rank.

    They are those of all positions in evaluation views of evenly spaced training images, at most
    `teacher.num_reduce_images`. So they depend on images and teacher alone; the cache keeps them
    for other runs.

    Raises:
        ValueError: a map is not finite, or all are equal.
    """
    num_images = config.teacher.num_reduce_images
    key = {"num_images": num_images, **sample_key(teacher, config, train)}

    def make() -> State:
        log.info("maps: measuring mean and spread of the teacher's channels")
        indices = evenly_spaced(len(train), num_images)
        rows = of_images(lambda views: _moments(teacher, views), teacher, config, train, indices)
        if not rows.isfinite().all():
            raise ValueError(
                "some of the teacher's maps are not finite: its weights are broken, or its inputs "
                "are"
            )
        means, variances = rows.double().chunk(2, dim=1)
        std = (variances.mean(0) + means.var(0, correction=0)).sqrt()
        return {"mean": means.mean(0).float(), "factor": inverse_std(std, "maps").float()}

    def read(path: Path) -> State:
        return read_state(path, term.state_dict())

    with distributed.rank0_first():
        if distributed.rank() == 0:
            term.load_state_dict(cached_state("maps", key, make, read))
    distributed.broadcast_buffers(term.to(device))
    log.info(
        "maps: %d channels of the teacher are standardised, %d of them are constant",
        len(term.mean),
        int((term.factor == 0).sum()),
    )


def _moments(teacher: Teacher, views: Tensor) -> Tensor:
    """Mean and variance over the positions of each image's map [N, 2 x C]."""
    maps = teacher.with_maps(views)[1].flatten(2)
    return torch.cat([maps.mean(2), maps.var(2, correction=0)], dim=1)
