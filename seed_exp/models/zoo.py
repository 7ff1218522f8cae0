"""Published weights: facts about each file, whether it is in the cache, whether it is intact."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from seed_exp.config.schema import StudentConfig, TeacherConfig
from seed_exp.models.download import (
    cached,
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
from seed_exp.models.students import STUDENTS, load_students
from seed_exp.models.teachers import (
    EMBEDDING_DIM,
    NETWORKS,
    TEACHERS,
    TeacherSpec,
    build_teacher,
    untrained_teacher,
)

SEED = "SEED (arXiv:2101.04731)"
NON_COMMERCIAL = {"CC-BY-NC-4.0"}
"""Licences that forbid commercial use."""


@dataclass(frozen=True)
class ZooEntry:
    """Facts about one published file; None = unknown."""

    name: str
    """Name in the zoo."""
    kind: str
    """`teacher` or `student`."""
    network: str
    """Key of NETWORKS or STUDENTS."""
    method: str
    """Method of its training without labels."""
    paper: str
    """Paper that describes the method."""
    epochs: int | None
    """Epochs of its training without labels on ImageNet-1k."""
    top1: float | None
    """Published top-1 accuracy in linear evaluation on ImageNet-1k, percent."""
    top1_source: str | None
    """Who published the accuracy."""
    licence: str | None
    """Licence of the weights."""
    hash: str | None
    """Hash of the file: algorithm and beginning of the hexadecimal digest."""
    hash_source: str | None
    """Who published the hash."""
    url: str | None
    """Address of the file; None = it has no lasting address."""
    size: int | None
    """Size of the file in bytes."""
    file_name: str
    """Name of the file in the cache."""
    use: str
    """Command and options that use the weights."""
    note: str
    """Further remarks for the user; may be empty."""
    doubt: str
    """Why no file can be known to be this entry's; empty where there is no doubt."""

    @property
    def path(self) -> Path:
        """Path of the file in the cache, whether it exists or not."""
        return cached(self.file_name)

    @property
    def forbids_commercial_use(self) -> bool | None:
        """Whether the licence forbids commercial use; None = the licence is unknown."""
        return None if self.licence is None else self.licence in NON_COMMERCIAL


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


@dataclass(frozen=True)
class _Publication:
    method: str
    paper: str
    source: str


@dataclass(frozen=True)
class _Released:
    network: str
    teacher: str
    epochs: int
    file: str | None
    """Name of the released file, without its ending; None = the link leads to another student's."""
    top1: float | None = None
    top1_source: str | None = SEED

    @property
    def local_views(self) -> bool:
        """Whether it was trained with local views, which SEED calls small patches."""
        return self.file is None or "SMALL_PATCH" in self.file


_PUBLICATIONS = {
    "moco_v1": _Publication("MoCo-V1", "arXiv:1911.05722", "github.com/facebookresearch/moco"),
    "moco_v2": _Publication("MoCo-V2", "arXiv:2003.04297", "github.com/facebookresearch/moco"),
    "moco_v3": _Publication("MoCo-V3", "arXiv:2104.02057", "github.com/facebookresearch/moco-v3"),
    "simclr": _Publication("SimCLR", "arXiv:2002.05709", "github.com/google-research/simclr"),
    "swav": _Publication("SwAV", "arXiv:2006.09882", "github.com/facebookresearch/swav"),
    "dino": _Publication("DINO", "arXiv:2104.14294", "github.com/facebookresearch/dino"),
    "vicreg": _Publication("VICReg", "arXiv:2105.04906", "github.com/facebookresearch/vicreg"),
    "barlow_twins": _Publication(
        "Barlow Twins", "arXiv:2103.03230", "github.com/facebookresearch/barlowtwins"
    ),
}
"""Beginning of a teacher's name, before its network -> its publication."""

# The rows of the table in SEED's README. An accuracy is given if the paper has a number for the
# same network, teacher and epochs.
_RESNET18_FILE = "resnet18_distill_resnet50-moco-v2-checkpoint_0199"
_RELEASED = {
    "seed_resnet18_moco_v2_r50": _Released(
        "resnet18", "ResNet-50 MoCo-V2", 200, _RESNET18_FILE, 57.6
    ),
    "seed_resnet18_swav_r50w2": _Released(
        "resnet18",
        "ResNet-50W2 SwAV",
        400,
        "AMP_SMALL_PATCH_400_resnet18_distill_resnet50w2-swav-checkpoint_0399",
    ),
    "seed_mobilenetv3_large_moco_v2_r50": _Released(
        "mobilenetv3_large",
        "ResNet-50 MoCo-V2",
        200,
        "mobilenetv3_large_distill-moco-v2-checkpoint_0199",
        55.2,
    ),
    "seed_efficientnet_b0_swav_r50w4": _Released(
        "efficientnet_b0",
        "ResNet-50W4 SwAV",
        400,
        "AMP_SMALL_PATCH_400_efficientnet_b0_distill_resnet50w4-swav-checkpoint_0399",
    ),
    "seed_efficientnet_b0_swav_r50w2": _Released(
        "efficientnet_b0",
        "ResNet-50W2 SwAV",
        800,
        "AMP_SMALL_PATCH_800_efficientnet_b0_distill_resnet50w2-swav-checkpoint_0799",
        67.6,
    ),
    # The README's only command for this pair is the one with local views.
    "seed_efficientnet_b1_swav_r50": _Released("efficientnet_b1", "ResNet-50 SwAV", 200, None),
    "seed_efficientnet_b1_swav_r152": _Released(
        "efficientnet_b1",
        "ResNet-152 SwAV",
        200,
        "AMP_200_efficientnet_b1_distill_resnet152-swav-checkpoint_0199",
    ),
    "seed_resnet50_swav_r50w4": _Released(
        "resnet50",
        "ResNet-50W4 SwAV",
        400,
        "AMP_SMALL_PATCH_400_resnet50_distill_resnet50w4-swav-checkpoint_0399",
        74.3,
        f"{SEED}, without its epochs",
    ),
}

_EXPIRES = "SEED's authors give it out behind links that expire: take a fresh one from their README"
_WRONG_LINK = (
    f"The link for it in SEED's README leads to {_RESNET18_FILE}.pth.tar, another student: "
    "no file is known to be this one, so none can be verified as it"
)
_NON_COMMERCIAL_NOTE = (
    "Its licence forbids commercial use, which may bind what is distilled from it too"
)


def zoo() -> dict[str, ZooEntry]:
    """All entries by name: the published teachers of TEACHERS, then the students of SEED."""
    teachers = {
        name: _teacher(name, spec)
        for name, spec in TEACHERS.items()
        if _published(name) in _PUBLICATIONS
    }
    return teachers | {name: _student(name, released) for name, released in _RELEASED.items()}


def num_parameters(entry: ZooEntry) -> int:
    """Number of parameters of the entry's encoder."""
    with torch.device("meta"):
        if entry.kind == "teacher":
            encoder: nn.Module = NETWORKS[entry.network]()
        else:
            encoder = STUDENTS[entry.network](StudentConfig(entry.network))
    return sum(parameter.numel() for parameter in encoder.parameters())


def cache_state(entry: ZooEntry) -> str:
    """State of the entry's file: `absent`, `partial 37 %`, `unverified`, `noted` or `verified`.

    `verified`: the file had the published hash and was not touched since. `noted`: nobody has
    published a hash, and the file is still the first one that was in the cache. The state is
    judged by names, sizes and times; no weights are read.
    """
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
    sha256 = _hash(entry, file)
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
    return Found(file, sha256, entry.hash, dim, entry.doubt)


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
            str(TEACHERS[entry.name].teacher_ssl),
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


def _published(name: str) -> str:
    """Key of _PUBLICATIONS for a teacher: `moco_v2` for `moco_v2_r50_800ep`."""
    return name.partition("_r")[0]


def _teacher(name: str, spec: TeacherSpec) -> ZooEntry:
    publication = _PUBLICATIONS[_published(name)]
    assert spec.network is not None
    assert spec.cache_name is not None
    source = SEED if spec.url is None else publication.source
    return ZooEntry(
        name,
        "teacher",
        spec.network,
        publication.method,
        publication.paper,
        spec.epochs,
        spec.top1,
        source if spec.top1 else None,
        spec.licence,
        spec.hash,
        (spec.hash_source or publication.source) if spec.hash else None,
        spec.url,
        spec.size,
        spec.cache_name,
        f"distill teacher={name}",
        _NON_COMMERCIAL_NOTE if spec.licence in NON_COMMERCIAL else "" if spec.url else _EXPIRES,
        "",
    )


def _student(name: str, released: _Released) -> ZooEntry:
    file_name = f"{name}.pth.tar"
    bound = (
        f"; SwAV's weights, which taught it, are {TEACHERS['swav_r50'].licence}"
        if "SwAV" in released.teacher
        else ""
    )
    views = " with local views" if released.local_views else ""
    named = "" if released.file is None else f". Its file there is {released.file}.pth.tar"
    return ZooEntry(
        name,
        "student",
        released.network,
        f"SEED from {released.teacher}{views}",
        "arXiv:2101.04731",
        released.epochs,
        released.top1,
        released.top1_source if released.top1 else None,
        None,
        None,
        None,
        None,
        None,
        file_name,
        f"distill student={released.network} students.{released.network}.init={cached(file_name)}",
        f"{_EXPIRES}{named}. SEED's code is MIT, of its weights nothing is said{bound}",
        _WRONG_LINK if released.file is None else "",
    )
