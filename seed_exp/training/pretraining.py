"""Pre-training without a teacher, from options to a finished run."""

from __future__ import annotations

import logging
from pathlib import Path

from seed_exp.config.schema import PretrainConfig
from seed_exp.data.order import refuse_large_batch
from seed_exp.engine import distributed
from seed_exp.engine.run import open_run
from seed_exp.methods.moco import Moco
from seed_exp.models.cpu_precision import chosen_formats, log_formats, precisions
from seed_exp.protocols.follow_up import plan_evaluations
from seed_exp.training.advice import large_queue_advice, length_advice, resolution_advice
from seed_exp.training.encoders import (
    build_students,
    finish,
    load_images,
    refuse_large_queue,
    student_inputs,
    train_encoders,
)

log = logging.getLogger("seed_exp")


def pretrain(config: PretrainConfig) -> Path:
    """Trains and evaluates the students of `config`; returns the run folder.

    Raises:
        ValueError: the queues do not fit into memory; or as `open_run`, `build_students`,
            `train_encoders` and `finish`.
    """
    evaluations = plan_evaluations(config)
    label = "-".join(["+".join(config.students), "moco_v2", config.views.name, config.data.source])
    device = distributed.local_device(config.device)
    with distributed.process_group(device):
        # 1. Images and networks. The first rank downloads and indexes, the others find it done.
        with distributed.rank0_first():
            images = load_images(config.data)
            refuse_large_batch(config.batch_size, len(images.train))
            config = config.sized_for(len(images.train))
            students = build_students(config, config.embedding_dim)
            size, dim = config.moco.queue_length, config.embedding_dim
            refuse_large_queue("moco.queue_size", size, dim, len(students))
            inputs = {
                **student_inputs(config.students, students),
                "data": images.train.fingerprint(),
            }
            choices = chosen_formats(
                config.precision, device, config.views, students, has_keys=True
            )
        formats = precisions(choices)
        with open_run("pretrain", label, config, inputs, device, formats=formats) as run:
            log_formats(run.formats, choices)
            # 2. The training.
            num, num_bytes = len(images.train), size * dim * 4 * len(students)
            for sentence in (
                *large_queue_advice("moco.queue_size", config.moco, num, num_bytes),
                *length_advice(config, num),
                *resolution_advice(config),
            ):
                log.warning("warning: %s", sentence)
            log.info("queue: %s places, %s training images", f"{size:,}", f"{num:,}")
            method = Moco(students, config.moco, config.seed)
            method.compute_in(run.formats)
            diverged = train_encoders(run, method, students, images)
            # 3. Whatever follows in the same job.
            finish(run, list(students), evaluations, diverged, images)
    return run.folder
