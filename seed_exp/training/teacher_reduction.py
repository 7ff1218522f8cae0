"""The reduction of a teacher's embeddings: fitted once, the same bits whenever a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seed_exp.config.schema import DistillConfig, Reduce, TeacherEmbedding
from seed_exp.data.sources import Source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.evaluation.setup import eval_options
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.reduction import Reduction, fit_reduction
from seed_exp.models.teachers import EMBEDDING_DIM
from seed_exp.models.weights import mismatch
from seed_exp.training.kept_state import State, cached_state, kept_state, read_state
from seed_exp.training.teacher_pass import of_images


def kept_reduction(folder: Path, teacher: Teacher, config: DistillConfig, train: Source) -> State:
    """State of the reduction of the run in `folder`; as `kept_state`, errors as `fit_reduction`."""
    dim = config.teacher.embedding_dim or EMBEDDING_DIM
    return kept_state(
        folder / "reduction.safetensors",
        lambda: cached_reduction(teacher, config, train),
        lambda path: read_reduction(path, teacher.embedding_dim, dim),
    )


def cached_reduction(teacher: Teacher, config: DistillConfig, train: Source) -> State:
    """State of the reduction from the cache; as `cached_state`, errors as `fit_reduction`.

    It is fitted on evaluation views of evenly spaced training images.
    """
    kind, dim = config.teacher.reduce, config.teacher.embedding_dim or EMBEDDING_DIM
    assert kind is not None
    num_images = config.teacher.num_reduce_images
    key = {
        "teacher": teacher.fingerprint,
        "network": [config.teacher.network, config.teacher.name, config.teacher_ssl.name],
        "reduce": [kind.value, dim, num_images],
        "data": train.fingerprint(),
        "views": eval_options(config.views),
        **embedding_key(config),
    }

    def make() -> State:
        indices = evenly_spaced(len(train), num_images)
        embeddings = of_images(teacher, teacher, config, train, indices)
        return fit_reduction(embeddings, dim, whiten=kind is Reduce.whiten).state_dict()

    return cached_state(
        "reductions", key, make, lambda path: read_reduction(path, teacher.embedding_dim, dim)
    )


def read_reduction(path: Path, in_dim: int, out_dim: int) -> State:
    """State of a reduction from `in_dim` to `out_dim` numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    state = read_state(path)
    if problem := mismatch(Reduction(in_dim, out_dim).state_dict(), state):
        raise ValueError(f"{path} is damaged ({problem})")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError(f"{path} is damaged (it has numbers that are not finite)")
    return state


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
