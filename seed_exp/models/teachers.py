"""The frozen networks that are distilled: published ones by name, and networks of our own runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from seed_exp.base.average_names import without_averages
from seed_exp.base.files import file_hash
from seed_exp.base.registry import Registry, lookup
from seed_exp.config.schema import TeacherConfig, TeacherEmbedding
from seed_exp.config.schema.networks import is_place
from seed_exp.models.download import cached, download, refuse_changed, user_mirrors
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.headless_teachers import custom_teacher, timm_teacher
from seed_exp.models.heads import head_from_layers
from seed_exp.models.inputs import InputSpec
from seed_exp.models.reduction import FULL_WIDTH, empty_reduction
from seed_exp.models.students import (
    load_students,
    student_files,
)
from seed_exp.models.teacher_ssl import MLP, TEACHER_SSL, load_weights
from seed_exp.models.timm_teachers import FAMILIES, TIMM_TEACHERS
from seed_exp.models.tokens import TOKENS, TokenPooling
from seed_exp.models.weights import read_checkpoint
from seed_exp.models.wide_resnet import WideResNet

_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
_MOCO_V3 = "https://dl.fbaipublicfiles.com/moco-v3"
_SWAV = "https://dl.fbaipublicfiles.com/deepcluster"
_DINO = "https://dl.fbaipublicfiles.com/dino"
_VICREG = "https://dl.fbaipublicfiles.com/vicreg"
_BARLOW_TWINS = (
    "https://dl.fbaipublicfiles.com/barlowtwins/ep1000_bs2048_lrw0.2_lrb0.0048_lambd0.0051"
)
_VISIONLAB = "hubconf.py of github.com/harvard-visionlab"
_CC_BY_NC = "CC-BY-NC-4.0"
EMBEDDING_DIM = 128
"""Width of the embeddings of the paper's teachers, and the default width of reduced embeddings."""

NETWORKS: dict[str, Callable[[], WideResNet]] = {
    "resnet50": lambda: WideResNet((3, 4, 6, 3)),
    "resnet101": lambda: WideResNet((3, 4, 23, 3)),
    "resnet152": lambda: WideResNet((3, 8, 36, 3)),
    "resnet50w2": lambda: WideResNet((3, 4, 6, 3), width=2),
    "resnet50w4": lambda: WideResNet((3, 4, 6, 3), width=4),
    "resnet50w5": lambda: WideResNet((3, 4, 6, 3), width=5),
}


@dataclass(frozen=True)
class TeacherSpec:
    """Facts about a published teacher; None = unknown. Empty for `timm` and `run`, and nearly so
    for those of TIMM_TEACHERS, whose facts stand there.
    """

    network: str | None = None
    """Key of NETWORKS."""
    teacher_ssl: str | None = None
    """Key of TEACHER_SSL: the convention of the published file."""
    epochs: int | None = None
    """Epochs of its self-supervised training on ImageNet-1k."""
    url: str | None = None
    """Address of the official file; None = it has no lasting address."""
    hash: str | None = None
    """Hash of the official file: algorithm and beginning of the hexadecimal digest."""
    top1: float | None = None
    """Published top-1 accuracy in linear evaluation on ImageNet-1k, percent."""
    licence: str | None = None
    """Licence of the weights."""
    hidden_dim: int = 2048
    """Hidden width of its projection head, if the convention's head has one."""
    head: str | None = None
    """Layers of its projection head; None = the first that the convention lists."""
    embedding_dim: int = EMBEDDING_DIM
    """Width of its embedding, if it has a projection head."""
    file_name: str | None = None
    """Name of the file in the cache; None = the last part of `url`."""
    hash_source: str | None = None
    """Who published the hash; None = the teacher's publisher, if there is a hash."""
    size: int | None = None
    """Size of the official file in bytes, according to `hash_source`."""
    build: Callable[[TeacherConfig, bool], Teacher] | None = None
    """Builder, for a teacher without an official file: (config, whether to load weights)."""

    @property
    def cache_name(self) -> str | None:
        """Name of its file in the cache; None if there is no such file."""
        return self.file_name or (self.url and self.url.rsplit("/", 1)[-1])


_TEACHERS: dict[str, TeacherSpec] = {
    "moco_v1_r50": TeacherSpec(
        "resnet50",
        "moco_v1",
        200,
        f"{_MOCO}/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar",
        "md5:b251726a",
        60.6,
        "MIT",
    ),
    "moco_v2_r50": TeacherSpec(
        "resnet50",
        "moco_v2",
        200,
        f"{_MOCO}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar",
        "md5:59fd9945",
        67.7,
        "MIT",
    ),
    "moco_v2_r50_800ep": TeacherSpec(
        "resnet50",
        "moco_v2",
        800,
        f"{_MOCO}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar",
        "md5:a04e12f8",
        71.1,
        "MIT",
    ),
    "moco_v2_r101": TeacherSpec(
        "resnet101", "moco_v2", 200, file_name="res101-moco-v2-checkpoint_0199.pth.tar"
    ),
    "moco_v2_r152": TeacherSpec(
        "resnet152",
        "moco_v2",
        200,
        top1=74.1,
        file_name="200-resnet152-moco-v2-checkpoint_0199.pth.tar",
    ),
    "moco_v2_r152_800ep": TeacherSpec(
        "resnet152", "moco_v2", 800, file_name="800-resnet152-moco-v2-checkpoint_0799.pth.tar"
    ),
    "simclr_r50": TeacherSpec("resnet50", "simclr", 200, file_name="simclr_200.pth"),
    "swav_r50_400ep": TeacherSpec(
        "resnet50",
        "swav",
        400,
        f"{_SWAV}/swav_400ep_pretrain.pth.tar",
        top1=74.6,
        licence=_CC_BY_NC,
    ),
    "swav_r50": TeacherSpec(
        "resnet50",
        "swav",
        800,
        f"{_SWAV}/swav_800ep_pretrain.pth.tar",
        top1=75.3,
        licence=_CC_BY_NC,
    ),
    "swav_r50w2": TeacherSpec(
        "resnet50w2",
        "swav",
        400,
        f"{_SWAV}/swav_RN50w2_400ep_pretrain.pth.tar",
        None,
        77.3,
        _CC_BY_NC,
        8192,
    ),
    "swav_r50w4": TeacherSpec(
        "resnet50w4",
        "swav",
        400,
        f"{_SWAV}/swav_RN50w4_400ep_pretrain.pth.tar",
        None,
        77.9,
        _CC_BY_NC,
        8192,
    ),
    "swav_r50w5": TeacherSpec(
        "resnet50w5",
        "swav",
        400,
        f"{_SWAV}/swav_RN50w5_400ep_pretrain.pth.tar",
        None,
        78.5,
        _CC_BY_NC,
        10240,
        MLP,
    ),
    "moco_v3_r50_100ep": TeacherSpec(
        "resnet50",
        "moco_v3",
        100,
        f"{_MOCO_V3}/r-50-100ep/r-50-100ep.pth.tar",
        None,
        68.9,
        _CC_BY_NC,
        4096,
        None,
        256,
    ),
    "moco_v3_r50_300ep": TeacherSpec(
        "resnet50",
        "moco_v3",
        300,
        f"{_MOCO_V3}/r-50-300ep/r-50-300ep.pth.tar",
        None,
        72.8,
        _CC_BY_NC,
        4096,
        None,
        256,
    ),
    "moco_v3_r50": TeacherSpec(
        "resnet50",
        "moco_v3",
        1000,
        f"{_MOCO_V3}/r-50-1000ep/r-50-1000ep.pth.tar",
        None,
        74.6,
        _CC_BY_NC,
        4096,
        None,
        256,
    ),
    "dino_r50": TeacherSpec(
        "resnet50",
        "torchvision",
        None,
        f"{_DINO}/dino_resnet50_pretrain/dino_resnet50_pretrain.pth",
        None,
        75.3,
        "Apache-2.0",
    ),
    "vicreg_r50": TeacherSpec(
        "resnet50",
        "torchvision",
        1000,
        f"{_VICREG}/resnet50.pth",
        "sha256:c843e7652491ff2f712734619fd74d85e5e92ac902615665ad3fd50dc6ada591",
        73.2,
        "MIT",
        file_name="vicreg_resnet50.pth",
        hash_source=f"{_VISIONLAB}/vicreg (its beginning) and others who used the file",
        size=94_345_885,
    ),
    "vicreg_r50w2": TeacherSpec(
        "resnet50w2",
        "torchvision",
        None,
        f"{_VICREG}/resnet50x2.pth",
        "sha256:65af82c4ad",
        75.5,
        "MIT",
        file_name="vicreg_resnet50x2.pth",
        hash_source=f"{_VISIONLAB}/vicreg",
    ),
    "barlow_twins_r50": TeacherSpec(
        "resnet50",
        "torchvision",
        1000,
        f"{_BARLOW_TWINS}/resnet50.pth",
        "sha256:cf015f40cc",
        73.5,
        "MIT",
        file_name="barlow_twins_resnet50.pth",
        hash_source=f"{_VISIONLAB}/barlowtwins",
    ),
    "resnet50": TeacherSpec("resnet50", "torchvision"),
    **{
        name: TeacherSpec(
            top1=facts.top1, licence=FAMILIES[facts.family].licence, build=timm_teacher
        )
        for name, facts in TIMM_TEACHERS.items()
    },
    "timm": TeacherSpec(build=timm_teacher),
    "run": TeacherSpec(build=lambda config, trained: _teacher_of_run(config, trained)),
}
TEACHERS: Registry[TeacherSpec] = Registry("TEACHERS", _TEACHERS)


def build_teacher(config: TeacherConfig, teacher_ssl: str) -> Teacher:
    """The teacher with its weights, from `config.checkpoint` or the official file.

    The official file is downloaded once into the cache: `cache_folder()`, or that of the Hugging
    Face hub for timm's networks. `config.reduce` is left to the caller, who has images to fit the
    reduction on.

    Args:
        config: `network` is a key of TEACHERS, or the place of a factory, which is imported; for
            `run`, `checkpoint` is a run folder or student file.
        teacher_ssl: Key of TEACHER_SSL, the convention of the checkpoint; `run` and `timm` ignore
            it.

    Raises:
        ValueError: no file is given or can be downloaded, it does not fit the network or the
            convention, or the network has no such embedding.
        FileNotFoundError: `config.checkpoint` does not exist.
    """
    teacher = _trained_teacher(config, teacher_ssl)
    _embed_by(teacher, config.embedding)
    return teacher


def _trained_teacher(config: TeacherConfig, teacher_ssl: str) -> Teacher:
    """The teacher with its head; arguments and errors as `build_teacher`."""
    spec = _spec(config.network)
    if spec.build is not None:
        return spec.build(config, True)
    path = (
        _official_file(config.network, spec, teacher_ssl)
        if config.checkpoint is None
        else Path(config.checkpoint)
    )
    with torch.device("meta"):
        encoder = NETWORKS[str(spec.network)]()
    head = load_weights(read_checkpoint(path), teacher_ssl, encoder, path)
    linear = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    teacher = Teacher(encoder, head, linear[-1].out_features if linear else encoder.num_features)
    teacher.fingerprint = file_hash(path)
    if config.checkpoint is None:
        refuse_changed(path, teacher.fingerprint)
    return teacher


def untrained_teacher(config: TeacherConfig, teacher_ssl: str) -> Teacher:
    """The network and head of `build_teacher` with random weights, for when only shapes matter.

    No weights are read or downloaded, except that a `run` is read from its checkpoint, which says
    what network it is. Arguments are as in `build_teacher`, but the embeddings have the width that
    `config.reduce` gives them.
    """
    spec = _spec(config.network)
    if spec.build is not None:
        teacher = spec.build(config, False)
    else:
        encoder = NETWORKS[str(spec.network)]()
        layers = (
            lookup(TEACHER_SSL, teacher_ssl, "teacher_ssl").heads[0]
            if spec.head is None
            else spec.head
        )
        dim = spec.embedding_dim if layers else encoder.num_features
        teacher = Teacher(
            encoder, head_from_layers(layers, encoder.num_features, spec.hidden_dim, dim), dim
        )
    _embed_by(teacher, config.embedding)
    if config.reduce is not None:
        dim = teacher.embedding_dim
        teacher.reduce_by(empty_reduction(config.reduce, dim, reduced_dim(config, dim)))
    return teacher


def reduced_dim(config: TeacherConfig, dim: int) -> int:
    """Width of the embeddings that students learn, of a teacher whose own are `dim` wide."""
    if config.reduce is None or config.reduce in FULL_WIDTH:
        return dim
    return config.embedding_dim or EMBEDDING_DIM


def _spec(network: str) -> TeacherSpec:
    if is_place(network):
        return TeacherSpec(build=custom_teacher)
    return lookup(TEACHERS, network, "teacher")


def _embed_by(teacher: Teacher, embedding: TeacherEmbedding) -> None:
    """Makes another output than the head's the embedding, if asked to."""
    if embedding in TOKENS:
        teacher.encoder = TokenPooling(teacher.encoder, embedding).eval()
    if embedding is not TeacherEmbedding.head:
        teacher.drop_head()


def _teacher_of_run(config: TeacherConfig, trained: bool) -> Teacher:  # noqa: ARG001
    if config.checkpoint is None:
        raise ValueError(
            "teacher=run needs teacher.checkpoint=PATH, "
            "a run folder of pretrain or distill or a student file"
        )
    path = Path(config.checkpoint)
    names = without_averages(student_files(path))
    if config.student is None and len(names) > 1:
        raise ValueError(
            f"{path} holds several networks; choose one with teacher.student={'|'.join(names)}"
        )
    name = config.student or names[0]
    student, header = load_students(path, [name])[name]
    expects = InputSpec(header["eval_views"]["mean"], header["eval_views"]["std"])
    teacher = Teacher(student.encoder, student.head, student.embedding_dim, expects)
    teacher.fingerprint = header["sha256"]
    return teacher


def _official_file(name: str, spec: TeacherSpec, teacher_ssl: str) -> Path:
    if spec.cache_name is None:
        raise ValueError(f"teacher={name} is a file of yours: give it with teacher.checkpoint=PATH")
    path = cached(spec.cache_name)
    if spec.url is None and not path.exists() and not user_mirrors(path.name):
        raise ValueError(
            f"teacher={name} has no lasting address to download from; "
            f"give its file with teacher.checkpoint=PATH or put it at {path}"
        )
    if teacher_ssl != spec.teacher_ssl:
        raise ValueError(
            f"the official file of teacher={name} needs teacher_ssl={spec.teacher_ssl}, "
            f"got {teacher_ssl}"
        )
    return download(spec.url, path, spec.hash)
