"""Bags of BINGO: each training image's nearest neighbours, found once and kept with the run."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seed_exp.config.schema import BingoBagsConfig, DistillConfig
from seed_exp.data.sources import Source
from seed_exp.engine.distributed import local_device
from seed_exp.evaluation.votes import nearest
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.training.kept_state import State, cached_state, kept_state, read_state
from seed_exp.training.teacher_pass import of_images
from seed_exp.training.teacher_reduction import sample_key

log = logging.getLogger("seed_exp")

QUERIES = 1 << 16
"""Images whose neighbours are looked for at a time."""


def kept_bags(folder: Path, teacher: Teacher, config: DistillConfig, train: Source) -> Tensor:
    """Bags [M, bag size] of the run in `folder`; as `kept_state`.

    Raises:
        ValueError: there are too few images; or as `kept_state` and `find_bags`.
    """
    objective = config.objective
    assert isinstance(objective, BingoBagsConfig)
    refuse_few_images(objective, len(train))
    key = {"bag_size": objective.bag_size, **sample_key(teacher, config, train)}

    def make() -> State:
        log.info("bags: looking for the %d neighbours of %d images", objective.bag_size, len(train))
        features = of_images(teacher.features, teacher, config, train, np.arange(len(train)))
        found = find_bags(features, objective.bag_size, local_device(config.device))
        return {"bags": found.int()}

    def read(path: Path) -> State:
        return read_bags(path, len(train), objective.bag_size)

    kept = kept_state(
        folder / "bags.safetensors", lambda: cached_state("bags", key, make, read), read
    )
    return kept["bags"].long()


def read_bags(path: Path, num_images: int, bag_size: int) -> State:
    """{"bags": [num_images, bag_size]} from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    expected = torch.empty(num_images, bag_size, dtype=torch.int32)
    state = read_state(path, {"bags": expected})
    bags = state["bags"]
    if bags.dtype != torch.int32 or not ((bags >= 0) & (bags < num_images)).all():
        raise ValueError(f"{path} is damaged (it names images that do not exist)")
    return state


def refuse_few_images(objective: BingoBagsConfig, num_images: int) -> None:
    """Checks that an image has enough neighbours.

    Raises:
        ValueError: it has not.
    """
    if num_images <= objective.bag_size:
        raise ValueError(
            f"objective.bag_size={objective.bag_size} neighbours of an image need more than "
            f"{num_images} images; choose a smaller bag"
        )


@torch.inference_mode()
def find_bags(features: Tensor, bag_size: int, device: torch.device) -> Tensor:
    """Numbers [M, bag_size] of the other images with the most similar features.

    Args:
        features: Features of all images [M, D] on the CPU, of any length.
        bag_size: Neighbours of an image, less than M.
        device: Where to compare.

    Raises:
        ValueError: a feature is not finite.
    """
    bags = []
    for start in range(0, len(features), QUERIES):
        rows = features[start : start + QUERIES].to(device)
        found = nearest(features, rows, bag_size + 1)[1].cpu()
        own = torch.arange(start, start + len(rows))[:, None]
        # Not simply without the first: an image may have twins.
        is_own = found == own
        is_own[~is_own.any(1), -1] = True
        bags.append(found[~is_own].view(len(rows), bag_size))
    return torch.cat(bags)
