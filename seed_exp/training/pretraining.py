"""Builds and trains encoders without a teacher."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from seed_exp.config.schema import PretrainConfig
from seed_exp.data.sources import Source
from seed_exp.methods.moco import Moco
from seed_exp.protocols.follow_up import plan_evaluations, run_evaluations
from seed_exp.training.encoders import (
    Built,
    OpenFolder,
    build_students,
    init_inputs,
    train_encoders,
)


def pretrain(config: PretrainConfig) -> Path:
    """Trains and evaluates the students of `config`; returns the run folder."""
    evaluations = plan_evaluations(config)
    label = "-".join(["+".join(config.students), "moco_v2", config.views.name, config.data.source])
    return train_encoders(
        "pretrain", label, config, build, then=partial(run_evaluations, evaluations)
    )


def build(config: PretrainConfig, train: Source, open_folder: OpenFolder) -> Built:  # noqa: ARG001
    """The students and their contrastive training."""
    students, weights = build_students(config, config.embedding_dim), init_inputs(config.students)
    return Built(
        open_folder(weights), students, Moco(students, config.moco, config.seed), weights, []
    )
