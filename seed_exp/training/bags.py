"""Bags of BINGO: each training image's nearest neighbours, found once and kept with the run."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from seed_exp.base.files import atomic_write, cache_folder
from seed_exp.config.schema import BingoBagsConfig, DistillConfig
from seed_exp.data.sources import Source
from seed_exp.engine.distributed import local_device
from seed_exp.evaluation.setup import eval_options
from seed_exp.evaluation.votes import nearest
from seed_exp.models.teachers import Teacher
from seed_exp.training.teacher_reduction import of_images

log = logging.getLogger("seed_exp")

QUERIES = 1 << 16
"""Images whose neighbours are looked for at a time."""


def kept_bags(folder: Path, teacher: Teacher, config: DistillConfig, train: Source) -> Tensor:
    """Bags [M, bag size] from the run folder: a run that goes on needs the same ones.

    A new run takes them from the cache, where all runs with this teacher and these images find the
    same ones. The first of them finds them.

    Raises:
        ValueError: the run has begun, but its bags are gone; or as `find_bags`.
    """
    kept = folder / "bags.safetensors"
    if not kept.exists() and (folder / "checkpoints").exists():
        raise ValueError(
            f"{kept} is gone, which {folder} was trained with; put it back, or choose another "
            "run_dir"
        )
    if not kept.exists():
        found = cached_bags(teacher, config, train)
        with atomic_write(kept) as file:
            file.write(save({"bags": found.int()}))
    try:
        return load_file(kept)["bags"].long()
    except SafetensorError as error:
        raise ValueError(
            f"{kept} is damaged ({error}); put back a good copy, or choose another run_dir"
        ) from None


def cached_bags(teacher: Teacher, config: DistillConfig, train: Source) -> Tensor:
    """Bags from the cache; found and cached if missing or damaged. Errors as `find_bags`."""
    objective = config.objective
    assert isinstance(objective, BingoBagsConfig)
    refuse_few_images(objective, len(train))
    key = {
        "teacher": teacher.fingerprint,
        "network": [config.teacher.network, config.teacher.name, config.teacher_ssl.name],
        "bag_size": objective.bag_size,
        "data": train.fingerprint(),
        "views": eval_options(config.views),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "bags" / f"{digest[:16]}.safetensors"
    with suppress(FileNotFoundError, SafetensorError):
        return load_file(path)["bags"].long()
    log.info("bags: looking for the %d neighbours of %d images", objective.bag_size, len(train))
    features = of_images(teacher.features, teacher, config, train, np.arange(len(train)))
    found = find_bags(features, objective.bag_size, local_device(config.device))
    with atomic_write(path) as file:
        file.write(save({"bags": found.int()}))
    return found


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
