"""The reduction of a teacher's embeddings: fitted once, the same bits whenever a run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from seed_exp.base.archives import lacks_memory
from seed_exp.base.files import atomic_write, cache_folder
from seed_exp.config.schema import DistillConfig, OnError, Reduce, TeacherEmbedding
from seed_exp.data.loader import load_batches
from seed_exp.data.sources import Source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.engine.distributed import local_device
from seed_exp.engine.run import num_workers_of
from seed_exp.evaluation.setup import eval_options
from seed_exp.models.reduction import Reduction, fit_reduction
from seed_exp.models.teachers import EMBEDDING_DIM, Teacher
from seed_exp.models.weights import mismatch, refuse_long_header
from seed_exp.views.recipe import EvalViews

log = logging.getLogger("seed_exp")

SAMPLE_BATCH = 64
"""Images per forward pass of the teacher when a reduction of its embeddings is fitted."""


def kept_reduction(
    folder: Path, teacher: Teacher, config: DistillConfig, train: Source
) -> dict[str, Tensor]:
    """State of the reduction, from the run folder: a run that goes on needs the same bits.

    A new run takes it from the cache, where all runs with this teacher and these images find the
    same one. The first of them fits it, on evaluation views of evenly spaced training images.

    Raises:
        ValueError: the run has begun, but its reduction is gone or damaged; or as fit_reduction.
    """
    kept = folder / "reduction.safetensors"
    if not kept.exists() and (folder / "checkpoints").exists():
        raise ValueError(
            f"{kept} is gone, which {folder} was trained with; put it back, or choose another "
            "run_dir"
        )
    if not kept.exists():
        state = cached_reduction(teacher, config, train)
        with atomic_write(kept) as file:
            file.write(save(state))
    try:
        dim = config.teacher.embedding_dim or EMBEDDING_DIM
        return read_reduction(kept, teacher.embedding_dim, dim)
    except ValueError as error:
        raise ValueError(f"{error}; put back a good copy, or choose another run_dir") from None


def cached_reduction(teacher: Teacher, config: DistillConfig, train: Source) -> dict[str, Tensor]:
    """State of the reduction from the cache; fitted and cached if missing or damaged.

    Errors as `fit_reduction`.
    """
    kind, dim = config.teacher.reduce, config.teacher.embedding_dim or EMBEDDING_DIM
    assert kind is not None
    key = {
        "teacher": teacher.fingerprint,
        "network": [config.teacher.network, config.teacher.name, config.teacher_ssl.name],
        "reduce": [kind.value, dim, config.teacher.num_reduce_images],
        "data": train.fingerprint(),
        "views": eval_options(config.views),
        **embedding_key(config),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "reductions" / f"{digest[:16]}.safetensors"
    with suppress(FileNotFoundError):
        try:
            return read_reduction(path, teacher.embedding_dim, dim)
        except ValueError as error:
            log.warning("%s; it is fitted anew", error)
    fitted = fit_reduction(
        sample_embeddings(teacher, config, train), dim, whiten=kind is Reduce.whiten
    )
    state: dict[str, Tensor] = fitted.state_dict()
    try:
        with atomic_write(path) as file:
            file.write(save(state))
    except OSError as error:
        log.warning("the reduction is not kept for other runs (%s)", error)
    return state


def read_reduction(path: Path, in_dim: int, out_dim: int) -> dict[str, Tensor]:
    """State of a reduction from `in_dim` to `out_dim` numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    try:
        refuse_long_header(path)
        state = load_file(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        if lacks_memory(error):
            raise
        raise ValueError(f"{path} is damaged ({error})") from None
    if problem := mismatch(Reduction(in_dim, out_dim).state_dict(), state):
        raise ValueError(f"{path} is damaged ({problem})")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError(f"{path} is damaged (it has numbers that are not finite)")
    return state


def embedding_key(config: DistillConfig) -> dict[str, str]:
    """The part of a cache's key that says which output of the teacher is the embedding.

    Nothing for the default, so that caches of versions without the choice stay valid.
    """
    embedding = config.teacher.embedding
    return {} if embedding is TeacherEmbedding.head else {"embedding": embedding.value}


def sample_embeddings(teacher: Teacher, config: DistillConfig, train: Source) -> Tensor:
    """Teacher embeddings [n, D], float32 on the CPU, of evenly spaced training images."""
    indices = evenly_spaced(len(train), config.teacher.num_reduce_images)
    return of_images(teacher, teacher, config, train, indices)


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
    views = EvalViews(config.views)
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
        rows, done = torch.empty(0), 0
        for batch in tqdm(batches, "teacher", len(order), leave=False):
            found = function(views.device(batch)["global"][0])
            if not done:  # one tensor for all: parts and their concatenation need twice the memory
                rows = torch.empty(len(indices), found.shape[1])
            rows[done : done + len(found)] = found
            done += len(found)
    teacher.cpu()  # as it came: what is added to it is there too, until training moves all of it
    return rows
