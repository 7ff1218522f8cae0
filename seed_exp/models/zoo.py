"""Published weights on this machine: whether a file is in the cache, and whether it is intact."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from seed_exp.config.schema import StudentConfig, TeacherConfig
from seed_exp.models.download import (
    check_hash,
    download,
    megabytes,
    note_hash,
    noted_hash,
    progress_of,
    refuse_changed,
    unchanged_since_noted,
    user_mirrors,
)
from seed_exp.models.hub_weights import fetch_from_hub, hub_hash
from seed_exp.models.students import STUDENTS, load_students
from seed_exp.models.teachers import (
    EMBEDDING_DIM,
    NETWORKS,
    TEACHERS,
    build_teacher,
    untrained_teacher,
)
from seed_exp.models.timm_teachers import TIMM_TEACHERS
from seed_exp.models.zoo_entries import ZooEntry


@dataclass(frozen=True)
class Found:
    """Findings of `verify` about a file."""

    path: Path
    """The file."""
    sha256: str
    """SHA-256 of the whole file, hexadecimal."""
    published: str | None
    """The published hash, which the file has; None = no hash is published."""
    embedding_dim: int
    """Width of the network's embeddings."""
    doubt: str
    """Why the file may be another than the entry's all the same; empty where there is no doubt."""


def num_parameters(entry: ZooEntry) -> int:
    """Number of parameters of the entry's encoder."""
    if entry.name in TIMM_TEACHERS:  # to make one takes a second, and a version of timm that has it
        return TIMM_TEACHERS[entry.name].parameters
    with torch.device("meta"):
        if entry.kind == "teacher":
            encoder: nn.Module = NETWORKS[entry.network]()
        else:
            encoder = STUDENTS[entry.network](StudentConfig(entry.network))
    return sum(parameter.numel() for parameter in encoder.parameters())


def cache_state(entry: ZooEntry) -> str:
    """State of the entry's file: `absent`, `partial 37 %`, `unverified`, `noted` or `verified`.

    Files of the Hugging Face hub are `absent` or `in the hub's cache`, which is not ours to note
    hashes in.

    `verified`: the file had the published hash and was not touched since. `noted`: nobody has
    published a hash, and the file is still the first one that was in the cache. The state is
    judged by names, sizes and times; no weights are read.
    """
    if entry.hub is not None:
        return "in the hub's cache" if entry.path.exists() else "absent"
    if entry.path.exists():
        algorithm, _, beginning = (entry.hash or "").partition(":")
        # The noted hash may be older than the published one.
        other = algorithm == "sha256" and not (noted_hash(entry.path) or "").startswith(beginning)
        if other or not unchanged_since_noted(entry.path):
            return "unverified"
        return "noted" if entry.hash is None else "verified"
    progress = progress_of(entry.path)
    if progress is None:
        return "absent"
    have, total = progress[0], progress[1] or entry.size
    return f"partial {100 * have // total} %" if total else f"partial {megabytes(have)}"


def fetch(entry: ZooEntry) -> Path:
    """The entry's file in the cache, downloaded if absent, and checked against its hash.

    Raises:
        ValueError: the file has no address, cannot be downloaded, or has another hash.
    """
    if entry.hub is not None:
        return entry.path if entry.path.exists() else fetch_from_hub(entry.hub)
    if entry.url is None and not entry.path.exists() and not user_mirrors(entry.file_name):
        raise ValueError(
            f"{entry.name} has no lasting address to download from; "
            f"put its file at {entry.path}. {'. '.join(filter(None, (entry.note, entry.doubt)))}"
        )
    path = download(entry.url, entry.path, entry.hash)
    if cache_state(entry) == "unverified":
        _hash(entry, path)
    return path


def verify(entry: ZooEntry, path: Path | None = None) -> Found:
    """Findings about the entry's file, after checking its hash and trying the network in it.

    The network must return finite embeddings of the right width.

    Args:
        entry: Entry that the file should belong to.
        path: The file; None = the one in the cache. If no hash is published, a later change is only
            noticed in the cache.

    Raises:
        ValueError: a check fails.
        FileNotFoundError: there is no such file.
    """
    file = entry.path if path is None else path
    if not file.is_file():
        raise FileNotFoundError(
            f"no file {file}" if path else f"{entry.name} is not in the cache: no file {file}"
        )
    published = entry.hash if entry.hub is None else hub_hash(file)
    sha256 = _hash(entry, file) if entry.hub is None else check_hash(file, published)
    network, dim = _load(entry, file)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embeddings = network.eval()(images)
    if embeddings.shape != (2, dim):
        raise ValueError(
            f"{file} gives embeddings {list(embeddings.shape)} of two images, expected {[2, dim]}"
        )
    if not embeddings.isfinite().all():
        raise ValueError(
            f"{file} gives embeddings that are not finite: broken weights; "
            "copy or download it again"
        )
    return Found(file, sha256, published, dim, entry.doubt)


def _hash(entry: ZooEntry, file: Path) -> str:
    """The SHA-256 of the file, checked; the first check of a file in the cache notes it."""
    try:
        sha256 = check_hash(file, entry.hash)
    except ValueError as error:
        advice = "delete it and fetch it again" if file == entry.path else "fetch it again"
        raise ValueError(f"{file} is not {entry.name}: {error}; {advice}") from None
    if file == entry.path:
        refuse_changed(file, sha256)
        if not unchanged_since_noted(file) and os.access(file.parent, os.W_OK):
            note_hash(file, sha256)
    return sha256


def _load(entry: ZooEntry, file: Path) -> tuple[nn.Module, int]:
    """The network in the file, and the expected width of its embeddings."""
    if entry.kind == "teacher":
        config, teacher_ssl = (
            TeacherConfig(entry.name, checkpoint=str(file)),
            str(TEACHERS[entry.name].teacher_ssl),  # one of timm ignores it
        )
        with torch.device("meta"):
            expected = untrained_teacher(config, teacher_ssl).embedding_dim
        return build_teacher(config, teacher_ssl), expected
    ((student, header),) = load_students(file).values()
    if (network := header["student"]["network"]) != entry.network:
        because = f". {entry.doubt}" if entry.doubt else ""
        raise ValueError(
            f"{file} holds a student {network}; {entry.name} is a {entry.network}{because}"
        )
    return student, EMBEDDING_DIM
