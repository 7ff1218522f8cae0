"""The reduction of a teacher's embeddings: fitted once, the same bits whenever a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seed_exp.base.registry import lookup
from seed_exp.config.schema import DistillConfig, TeacherEmbedding
from seed_exp.data.sources import Source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.evaluation.setup import eval_options
from seed_exp.methods.objectives import OBJECTIVES
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.reduction import FULL_WIDTH, Reduction, empty_reduction, fitted_reduction
from seed_exp.models.teachers import reduced_dim
from seed_exp.training.kept_state import State, cached_state, kept_state, read_state
from seed_exp.training.teacher_pass import of_images


def kept_reduction(folder: Path, teacher: Teacher, config: DistillConfig, train: Source) -> State:
    """State of the reduction of the run in `folder`, as `kept_state`.

    Errors as `fitted_reduction`.
    """
    return kept_state(
        folder / "reduction.safetensors",
        lambda: cached_reduction(teacher, config, train),
        lambda path: read_state(path, fresh_reduction(config, teacher).state_dict()),
    )


def cached_reduction(teacher: Teacher, config: DistillConfig, train: Source) -> State:
    """State of the reduction from the cache; as `cached_state`, errors as `fit_reduction`.

    It is fitted on evaluation views of evenly spaced training images.
    """
    kind, dim = config.teacher.reduce, reduced_dim(config.teacher, teacher.embedding_dim)
    assert kind is not None
    num_images = config.teacher.num_reduce_images
    key = {"reduce": [kind.value, dim, num_images], **sample_key(teacher, config, train)}

    def make() -> State:
        indices = evenly_spaced(len(train), num_images)
        embeddings = of_images(teacher, teacher, config, train, indices)
        return fitted_reduction(kind, embeddings, dim).state_dict()

    expected = fresh_reduction(config, teacher).state_dict()
    return cached_state("reductions", key, make, lambda path: read_state(path, expected))


def fresh_reduction(config: DistillConfig, teacher: Teacher) -> Reduction:
    """A fresh reduction of the kind that `config` asks for; errors as `Reduction`.

    An objective that compares lengths gets the standardised embeddings at their own.
    """
    kind, dim = config.teacher.reduce, teacher.embedding_dim
    assert kind is not None
    compares_lengths = not lookup(OBJECTIVES, config.objective.name, "objective").unit_length
    return empty_reduction(
        kind,
        dim,
        reduced_dim(config.teacher, dim),
        unit_length=not (compares_lengths and kind in FULL_WIDTH),
    )


def sample_key(teacher: Teacher, config: DistillConfig, train: Source) -> dict[str, Any]:
    """The part of a cache's key that says what the teacher gives for images of a sample."""
    return {
        "teacher": teacher.fingerprint,
        "network": [config.teacher.network, config.teacher.name, config.teacher_ssl.name],
        "data": train.fingerprint(),
        "views": eval_options(config.views),
        **embedding_key(config),
    }


def embedding_key(config: DistillConfig) -> dict[str, Any]:
    """The part of a cache's key that says how the teacher is used: its output, and its views' size.

    Nothing for the defaults, so that caches of versions without the choices stay valid.
    """
    key: dict[str, Any] = {}
    if config.teacher.embedding is not TeacherEmbedding.head:
        key["embedding"] = config.teacher.embedding.value
    if config.teacher.size is not None:
        key["size"] = [config.teacher.size, config.views.crops["global"].size]
    return key
