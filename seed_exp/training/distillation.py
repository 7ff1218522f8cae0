"""Builds and trains the students of a frozen teacher."""

from __future__ import annotations

import hashlib
import json
import math
import re
from contextlib import closing, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from seed_exp import __version__
from seed_exp.base.files import atomic_write, cache_folder
from seed_exp.base.registry import lookup
from seed_exp.config.options import to_plain
from seed_exp.config.schema import DistillConfig, OnError, Reduce
from seed_exp.data.loader import load_batches
from seed_exp.data.sources import Source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine.distributed import local_device
from seed_exp.engine.precision import resolve
from seed_exp.evaluation.setup import eval_options, num_workers_of
from seed_exp.methods.objectives import OBJECTIVES
from seed_exp.methods.seed import Seed
from seed_exp.methods.teacher_cache import TeacherCache
from seed_exp.models.cost import forward_flops
from seed_exp.models.reduction import Reduction, fit_reduction
from seed_exp.models.students import Student
from seed_exp.models.teachers import EMBEDDING_DIM, Teacher, build_teacher
from seed_exp.models.weights import tensors_hash
from seed_exp.protocols.follow_up import plan_evaluations, run_evaluations
from seed_exp.training.encoders import (
    Built,
    OpenFolder,
    build_students,
    init_inputs,
    train_encoders,
)
from seed_exp.views.recipe import EvalViews

SAMPLE_BATCH = 64
"""Images per forward pass of the teacher when a reduction of its embeddings is fitted."""


def distill(config: DistillConfig) -> Path:
    """Trains and evaluates the students of `config`; returns the run folder.

    Raises:
        ValueError: the objective compares more views than there are, or as `train_encoders`.
    """
    num, needed = (
        config.views.crops["global"].num,
        lookup(OBJECTIVES, config.objective.name, "objective").min_global_views,
    )
    if num < needed:
        raise ValueError(
            f"objective={config.objective.name} compares {needed} global views of an image; views.crops.global.num is {num}"
        )
    evaluations = plan_evaluations(config)
    teacher = re.sub(
        r"[^\w.]+", "_", config.teacher.name or config.teacher.network
    )  # the hub's names have slashes
    label = "-".join(["+".join(config.students), teacher, config.views.name, config.data.source])
    return train_encoders(
        "distill", label, config, build, then=partial(run_evaluations, evaluations)
    )


def build(config: DistillConfig, train: Source, open_folder: OpenFolder) -> Built:
    """The students and their distillation from the teacher.

    Raises:
        ValueError: the teacher does not take the views or cannot be reduced, the teacher cache is of something else, or as
            build_students and open_run.
    """
    notes = []
    teacher = build_teacher(config.teacher, config.teacher_ssl.name)
    teacher.adapt_to(config.views)
    teacher.fold_batch_norm()
    reduction, embedding_dim = None, teacher.embedding_dim
    if config.teacher.reduce is not None:
        embedding_dim = config.teacher.embedding_dim or EMBEDDING_DIM
        reduction = Reduction(teacher.embedding_dim, embedding_dim)
    students = build_students(config, embedding_dim)
    weights = {"teacher": teacher.fingerprint, **init_inputs(config.students)}
    folder = open_folder(weights)
    if reduction is not None:
        reduction.load_state_dict(kept_reduction(folder, teacher, config, train))
        notes.append(
            f"teacher: {teacher.embedding_dim} numbers of an embedding reduced to {embedding_dim}, "
            f"which have {100 * reduction.kept_variance:.1f} % of the variance"
        )
        teacher.reduce_by(reduction)
    num_views = {name: crop.num for name, crop in config.views.crops.items() if crop.num > 0}
    cache = (
        None
        if config.teacher_cache is None
        else open_cache(Path(config.teacher_cache), config, teacher, train, num_views)
    )
    method = Seed(students, teacher, config.objective, num_views, config.seed, cache)
    if cache is not None:
        notes.append(cache_costs(cache, config, students, teacher, train))
    return Built(folder, students, method, weights, notes)


def kept_reduction(
    folder: Path, teacher: Teacher, config: DistillConfig, train: Source
) -> dict[str, Tensor]:
    """The state of the reduction of the teacher's embeddings: the run folder's, for a run that goes on needs the same bits.

    A new run takes it from the cache, where all runs with this teacher and these images find the same one; the first of them
    fits it, on evaluation views of evenly spread training images.

    Raises:
        ValueError: the run has begun, but its reduction is gone; or as fit_reduction.
    """
    kept = folder / "reduction.safetensors"
    if not kept.exists() and (folder / "checkpoints").exists():
        raise ValueError(
            f"{kept} is gone, which {folder} was trained with; put it back, or choose another run_dir"
        )
    if not kept.exists():
        state = cached_reduction(teacher, config, train)
        with atomic_write(kept) as file:
            file.write(save(state))
    try:
        return load_file(kept)
    except SafetensorError as error:
        raise ValueError(
            f"{kept} is damaged ({error}); put back a good copy, or choose another run_dir"
        ) from None


def cached_reduction(teacher: Teacher, config: DistillConfig, train: Source) -> dict[str, Tensor]:
    """What the cache has of it, fitted where that is nothing whole; errors as fit_reduction."""
    kind, dim = config.teacher.reduce, config.teacher.embedding_dim or EMBEDDING_DIM
    assert kind is not None
    key = {
        "teacher": teacher.fingerprint,
        "network": [config.teacher.network, config.teacher.name, config.teacher_ssl.name],
        "reduce": [kind.value, dim, config.teacher.num_reduce_images],
        "data": train.fingerprint(),
        "views": eval_options(config.views),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "reductions" / f"{digest[:16]}.safetensors"
    with suppress(FileNotFoundError, SafetensorError):
        return load_file(path)
    fitted = fit_reduction(
        sample_embeddings(teacher, config, train), dim, whiten=kind is Reduce.whiten
    )
    state: dict[str, Tensor] = fitted.state_dict()
    with atomic_write(path) as file:
        file.write(save(state))
    return state


@torch.inference_mode()
def sample_embeddings(teacher: Teacher, config: DistillConfig, train: Source) -> Tensor:
    """The teacher's embeddings [n, D], float32 on the CPU, of evaluation views of evenly spread training images."""
    device = local_device(config.device)
    teacher.to(device)
    views = EvalViews(config.views)
    indices = evenly_spaced(len(train), config.teacher.num_reduce_images)
    order = [
        (0, indices[start : start + SAMPLE_BATCH]) for start in range(0, len(indices), SAMPLE_BATCH)
    ]
    # Training lists the images that cannot be read.
    on_bad = (lambda _index, _error: None) if config.data.on_error is OnError.skip else None
    with closing(
        load_batches(
            train,
            views,
            order,
            num_workers=num_workers_of(config.data),
            device=device,
            on_bad=on_bad,
        )
    ) as batches:
        rows = [
            teacher(views.device(batch)["global"][0]).cpu()
            for batch in tqdm(batches, "teacher", len(order), leave=False)
        ]
    teacher.cpu()  # as it came: what is added to it is there too, until training moves all of it
    return torch.cat(rows)


def open_cache(
    folder: Path, config: DistillConfig, teacher: Teacher, train: Source, num_views: dict[str, int]
) -> TeacherCache:
    """The cache in `folder` for exactly these embeddings; errors as TeacherCache."""
    evaluation = eval_options(config.views).keys() - {"mean", "std"}
    key = {
        "teacher": teacher.fingerprint,
        "reduction": None
        if teacher.reduction is None
        else tensors_hash(teacher.reduction.state_dict()),
        "teacher_ssl": config.teacher_ssl.name,
        "teacher_inputs": asdict(teacher.inputs.spec),
        "data": train.fingerprint(),
        "views": {
            name: value for name, value in to_plain(config.views).items() if name not in evaluation
        },
        "seed": config.seed,
        "precision": resolve(config.precision, local_device(config.device)).value,
        "version": __version__,
    }
    return TeacherCache(
        folder, key, num_images=len(train), num_views=num_views, embedding_dim=teacher.embedding_dim
    )


def cache_costs(
    cache: TeacherCache,
    config: DistillConfig,
    students: dict[str, Student],
    teacher: Teacher,
    train: Source,
) -> str:
    """What the cache takes and saves, in words; errors as TeacherCache.describe."""
    crops = [crop for crop in config.views.crops.values() if crop.num > 0]
    forward = sum(crop.num * forward_flops(teacher, crop.size) for crop in crops)
    # A backward pass costs about two forward passes.
    training = sum(
        3 * crop.num * forward_flops(student, crop.size)
        for crop in crops
        for student in students.values()
    )
    steps_per_epoch = (
        max(1, len(train) // config.batch_size) if isinstance(config.batch_size, int) else 1
    )
    epochs = config.epochs if config.steps is None else math.ceil(config.steps / steps_per_epoch)
    return f"{cache.describe(epochs)}; what it holds saves {100 * forward / (forward + training):.0f} % of a step's arithmetic"
