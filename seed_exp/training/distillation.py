"""Distillation: the students of a frozen teacher, from options to a finished run."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from seed_exp import __version__
from seed_exp.base.network_names import TEACHER
from seed_exp.base.registry import lookup
from seed_exp.config.options import to_plain
from seed_exp.config.schema import DistillConfig, Precision, SeedGeneralConfig
from seed_exp.config.schema.parts import require_global_only, require_unmixed
from seed_exp.data.order import refuse_large_batch
from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.engine.checkpoint import newest_checkpoint
from seed_exp.engine.fleet import is_compiled
from seed_exp.engine.precision import dtype_of
from seed_exp.engine.run import open_run
from seed_exp.evaluation.setup import eval_options
from seed_exp.methods.bags import BagSeed, needs_bags
from seed_exp.methods.dense import dense_term, refuse_dense_cache
from seed_exp.methods.objectives import OBJECTIVES
from seed_exp.methods.seed import Seed
from seed_exp.methods.teacher_cache import TeacherCache, make_folder, refuse_without_room
from seed_exp.models.cost import forward_flops
from seed_exp.models.cpu_precision import chosen_formats, log_formats, precisions
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.reduction import FULL_WIDTH
from seed_exp.models.students import Student
from seed_exp.models.teacher_precision import teacher_dtype
from seed_exp.models.teachers import build_teacher, reduced_dim
from seed_exp.models.weights import tensors_hash
from seed_exp.protocols.follow_up import plan_evaluations
from seed_exp.training.advice import length_advice, queue_advice, resolution_advice
from seed_exp.training.bags import kept_bags
from seed_exp.training.encoders import (
    build_students,
    finish,
    load_images,
    refuse_large_queue,
    student_inputs,
    train_encoders,
)
from seed_exp.training.map_scale import fit_map_scale
from seed_exp.training.queue_start import start_from_images
from seed_exp.training.teacher_reduction import embedding_key, fresh_reduction, kept_reduction

log = logging.getLogger("seed_exp")


def distill(config: DistillConfig) -> Path:
    """Trains and evaluates the students of `config`; returns the run folder.

    Raises:
        ValueError: the objective compares other views than there are; its queues do not fit into
            memory; images have too few neighbours for bags; the teacher does not take the views or
            cannot be reduced; maps cannot be compared; the teacher cache has no room, or cannot
            hold maps; no temperature gives the target its neighbours; or as `open_run`,
            `build_students`, `train_encoders` and `finish`.
    """
    refuse_missing_views(config)
    evaluations = plan_evaluations(config)
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        # 1. Images and networks. The first rank downloads and indexes, the others find it done.
        with distributed.rank0_first():
            images = load_images(config.data)
            refuse_large_batch(config.batch_size, len(images.train))
            config = config.sized_for(len(images.train))
            teacher = build_teacher(config.teacher, config.teacher_ssl.name)
            teacher.adapt_to(config.views, config.teacher.size)
            if not config.objective.has_batch_teacher:
                teacher.fold_batch_norm()
            refuse_dense_cache(config, teacher, len(images.train))
            dim = reduced_dim(config.teacher, teacher.embedding_dim)
            students = build_students(config, dim)
            dense = dense_term(config.objective, students, teacher, config.views, config.seed)
            size, num_queues = config.objective.queue_length, len(numbers_of_views(config))
            refuse_large_queue("objective.queue_size", size, dim, num_queues)
            inputs = {"teacher": teacher.fingerprint, **student_inputs(config.students, students)}
            inputs |= {"data": images.train.fingerprint()}
            has_keys = lookup(OBJECTIVES, config.objective.name, "objective").contrast is not None
            choices = chosen_formats(
                *(config.precision, device, config.views, students),
                teacher=config.teacher,
                objective=config.objective,
                has_keys=has_keys,
            )
        formats = precisions(choices)
        with open_run("distill", label_of(config), config, inputs, device, formats=formats) as run:
            log_formats(run.formats, choices)
            # 2. The teacher's embeddings: narrower if asked for, and kept if asked for; bags.
            with distributed.rank0_first():
                # First: to fit a reduction takes minutes.
                refuse_unfit_cache(config, teacher, images.train)
                if config.teacher.reduce is not None:
                    reduce_embeddings(teacher, run.folder, config, images.train)
                cache = open_cache(config, teacher, images.train, run.formats)
                bags = None
                if needs_bags(config.objective):
                    bags = kept_bags(run.folder, teacher, config, images.train)
            if cache is not None:
                log.info("%s", cache_costs(cache, config, students, teacher, images.train))
            # 3. The queue, the temperature and the scale of maps, which are in every checkpoint.
            is_general = isinstance(teacher.head, nn.Identity)
            if is_general and isinstance(config.objective, SeedGeneralConfig):
                log.info(
                    "objective: seed_general, for a teacher without a projection head; "
                    "objective=seed is the paper's"
                )
            for sentence in (
                *queue_advice(config, len(images.train), teacher.embedding_dim),
                *length_advice(config, len(images.train)),
                *resolution_advice(config),
            ):
                log.warning("warning: %s", sentence)
            size = config.objective.queue_length
            log.info("queue: %s places, %s training images", f"{size:,}", f"{len(images.train):,}")
            num_views = numbers_of_views(config)
            parts = (students, teacher, config.objective, num_views, config.seed, cache)
            method = Seed(*parts, dense=dense) if bags is None else BagSeed(*parts, bags=bags)
            is_new = newest_checkpoint(run.folder) is None
            if is_new and dense is not None:
                # Before the networks get formats of their own: the cache serves every CPU.
                fit_map_scale(dense, teacher, config, images.train, device)
            method.compute_in(run.formats)
            if is_new:
                folder = None if cache is None else cache.folder
                start_from_images(method, teacher, config, images.train, device, folder)
            # 4. The training.
            with nullcontext() if cache is None else closing(cache):
                diverged = train_encoders(run, method, students, images)
            # 5. Whatever follows in the same job.
            finish(run, list(students), evaluations, diverged, images)
    return run.folder


def refuse_missing_views(config: DistillConfig) -> None:
    """Checks that each image has the views that the objective compares.

    Raises:
        ValueError: there are too few global views, local ones that it does not take, or views that
            are mixed apart from each other.
    """
    num = config.views.crops["global"].num
    needed = lookup(OBJECTIVES, config.objective.name, "objective").min_global_views
    if num < needed:
        raise ValueError(
            f"objective={config.objective.name} compares {needed} global views of an image; "
            f"views.crops.global.num is {num}"
        )
    if needed > 1:
        reason = f"it compares {needed} views of an image, which would be mixed in as many ways"
        require_unmixed(config.views, f"objective={config.objective.name}", reason)
    if needs_bags(config.objective):
        require_global_only(config.views, f"objective={config.objective.name}")


def label_of(config: DistillConfig) -> str:
    """The readable beginning of the run folder's name: students, teacher, views, source."""
    # The hub's names have slashes.
    teacher = re.sub(r"[^\w.]+", "_", config.teacher.name or config.teacher.network)
    return "-".join(["+".join(config.students), teacher, config.views.name, config.data.source])


def numbers_of_views(config: DistillConfig) -> dict[str, int]:
    """Views per image by resolution, without resolutions that have none."""
    return {name: crop.num for name, crop in config.views.crops.items() if crop.num > 0}


def reduce_embeddings(teacher: Teacher, folder: Path, config: DistillConfig, train: Source) -> None:
    """Makes the teacher's embeddings narrower, or standardised, by the run's reduction.

    Errors as `kept_reduction`.
    """
    reduction, kind = fresh_reduction(config, teacher), config.teacher.reduce
    reduction.load_state_dict(kept_reduction(folder, teacher, config, train))
    if kind in FULL_WIDTH:
        log.info(
            "teacher: embeddings of %d numbers, standardised (%s)", reduction.out_dim, kind.value
        )
    else:
        log.info(
            "teacher: embeddings reduced from %d to %d numbers, which have %.1f %% of the variance",
            teacher.embedding_dim,
            reduction.out_dim,
            100 * reduction.kept_variance,
        )
    teacher.reduce_by(reduction)


def refuse_unfit_cache(config: DistillConfig, teacher: Teacher, train: Source) -> None:
    """Checks the folder of the teacher cache before its key is known.

    Raises:
        ValueError: it is a file, or it holds no cache yet and has no room for one.
    """
    if config.teacher_cache is None:
        return
    root = Path(config.teacher_cache)
    make_folder(root)
    if not any(root.iterdir()):
        dim = reduced_dim(config.teacher, teacher.embedding_dim)
        num_views = numbers_of_views(config)
        refuse_without_room(root, len(train), num_views, dim, num_epochs(config, train))


def open_cache(
    config: DistillConfig, teacher: Teacher, train: Source, formats: Mapping[str, Precision]
) -> TeacherCache | None:
    """The cache of exactly these embeddings; None if none is asked for.

    Errors as `TeacherCache`.

    Args:
        config: All options.
        teacher: Whose embeddings.
        train: The training images.
        formats: Networks of the run with a number format of their own.
    """
    if config.teacher_cache is None:
        return None
    evaluation = eval_options(config.views).keys() - {"mean", "std"}
    device = distributed.local_device(config.device)
    own = formats.get(TEACHER, config.precision)
    dtype = teacher_dtype(dtype_of(own, device), device.type)
    views = to_plain(config.views)
    # Without them the key is that of earlier versions.
    for added in ("operations", "mixup", "resolution"):
        if not views[added]:
            del views[added]
    reduction = teacher.reduction
    key: dict[str, Any] = {
        "teacher": teacher.fingerprint,
        "reduction": None if reduction is None else tensors_hash(reduction.state_dict()),
        "teacher_ssl": config.teacher_ssl.name,
        "teacher_inputs": asdict(teacher.inputs.spec),
        "data": train.fingerprint(),
        "views": {name: value for name, value in views.items() if name not in evaluation},
        "seed": config.seed,
        **embedding_key(config),
        "precision": str(dtype).removeprefix("torch."),
        # Each rounds differently: the views' colours, and the teacher's layers.
        "device": device.type,
        "compile": is_compiled(config, device),
        "deterministic": config.deterministic,
        "version": __version__,
    }
    if not teacher.unit_length:
        key["unit_length"] = False
    return TeacherCache(
        Path(config.teacher_cache),
        key,
        num_images=len(train),
        num_views=numbers_of_views(config),
        embedding_dim=teacher.embedding_dim,
        in_pairs=config.views.mixup,
        of_sizes=config.views.resolution is not None,
    )


def cache_costs(
    cache: TeacherCache,
    config: DistillConfig,
    students: dict[str, Student],
    teacher: Teacher,
    train: Source,
) -> str:
    """Sentence on the cost and gain of the cache; errors as `TeacherCache.describe`."""
    crops = [crop for crop in config.views.largest().crops.values() if crop.num > 0]
    forward = sum(crop.num * forward_flops(teacher, crop.size) for crop in crops)
    # A backward pass costs about two forward passes.
    training = sum(
        3 * crop.num * forward_flops(student, crop.size)
        for crop in crops
        for student in students.values()
    )
    saved = 100 * forward / (forward + training)
    size = cache.describe(num_epochs(config, train))
    return f"{size}; what it holds saves {saved:.0f} % of a step's arithmetic"


def num_epochs(config: DistillConfig, train: Source) -> int:
    """Epochs of the training, begun ones included."""
    if config.steps is None:
        return config.epochs
    steps = len(train) // config.batch_size if isinstance(config.batch_size, int) else 1
    return math.ceil(config.steps / max(1, steps))
