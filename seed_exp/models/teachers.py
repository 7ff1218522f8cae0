"""The frozen networks that are distilled: which official file is which network, and networks of our own runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.config.schema import TeacherConfig
from seed_exp.files import file_hash
from seed_exp.models.download import download
from seed_exp.models.folding import fold_batch_norm
from seed_exp.models.heads import projection_head
from seed_exp.models.students import load_students, student_files
from seed_exp.models.teacher_ssl import MLP, TEACHER_SSL, load_weights
from seed_exp.models.weights import read_checkpoint
from seed_exp.models.wide_resnet import WideResNet
from seed_exp.registry import lookup

_MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints"
_SWAV = "https://dl.fbaipublicfiles.com/deepcluster"
_CC_BY_NC = "CC-BY-NC-4.0"
EMBEDDING_DIM = 128
"""Width of the embedding of every published teacher."""
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

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
    """What is known of a published teacher; all None for a network of our own, whose file says it."""

    network: str | None = None
    """Key of NETWORKS."""
    teacher_ssl: str | None = None
    """Key of TEACHER_SSL that the published file follows."""
    epochs: int | None = None
    """Epochs of its self-supervised training on ImageNet-1k."""
    url: str | None = None
    """Official file; None = it has no lasting address."""
    hash: str | None = None
    """Algorithm and beginning of the official file's hash."""
    top1: float | None = None
    """Published top-1 accuracy in linear evaluation on ImageNet-1k, percent."""
    licence: str | None = None
    """Licence of the weights."""
    hidden_dim: int = 2048
    """Hidden width of its projection head, where the convention's head has one."""
    head: str | None = None
    """Layers of its projection head; None = those that the convention names first."""


TEACHERS: dict[str, TeacherSpec] = {
    "moco_v1_r50": TeacherSpec(
        "resnet50", "moco_v1", 200, f"{_MOCO}/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar", "md5:b251726a", 60.6, "MIT"
    ),
    "moco_v2_r50": TeacherSpec(
        "resnet50", "moco_v2", 200, f"{_MOCO}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar", "md5:59fd9945", 67.7, "MIT"
    ),
    "moco_v2_r50_800ep": TeacherSpec(
        "resnet50", "moco_v2", 800, f"{_MOCO}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", "md5:a04e12f8", 71.1, "MIT"
    ),
    "moco_v2_r101": TeacherSpec("resnet101", "moco_v2", 200),
    "moco_v2_r152": TeacherSpec("resnet152", "moco_v2", 200, top1=74.1),
    "moco_v2_r152_800ep": TeacherSpec("resnet152", "moco_v2", 800),
    "simclr_r50": TeacherSpec("resnet50", "simclr", 200),
    "swav_r50_400ep": TeacherSpec("resnet50", "swav", 400, f"{_SWAV}/swav_400ep_pretrain.pth.tar", top1=74.6, licence=_CC_BY_NC),
    "swav_r50": TeacherSpec("resnet50", "swav", 800, f"{_SWAV}/swav_800ep_pretrain.pth.tar", top1=75.3, licence=_CC_BY_NC),
    "swav_r50w2": TeacherSpec(
        "resnet50w2", "swav", 400, f"{_SWAV}/swav_RN50w2_400ep_pretrain.pth.tar", None, 77.3, _CC_BY_NC, 8192
    ),
    "swav_r50w4": TeacherSpec(
        "resnet50w4", "swav", 400, f"{_SWAV}/swav_RN50w4_400ep_pretrain.pth.tar", None, 77.9, _CC_BY_NC, 8192
    ),
    "swav_r50w5": TeacherSpec(
        "resnet50w5", "swav", 400, f"{_SWAV}/swav_RN50w5_400ep_pretrain.pth.tar", None, 78.5, _CC_BY_NC, 10240, MLP
    ),
    "run": TeacherSpec(),
}


class Teacher(nn.Module):
    """An encoder and its projection head, frozen and in evaluation mode whatever the caller does.

    Args:
        encoder: Maps images [N, 3, H, W] to features [N, num_features].
        head: Maps features to embeddings [N, embedding_dim].
        embedding_dim: Width D of the embedding.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, embedding_dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.embedding_dim = embedding_dim
        self.fingerprint = ""
        """Hash of the file that the weights come from."""
        self.normalisation: tuple[list[float], list[float]] = IMAGENET_MEAN, IMAGENET_STD
        """Mean and standard deviation per channel with which its images were normalised."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002
        """Stays in evaluation mode: batch statistics of training must not reach the teacher."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [N, D] of unit length, float32 also under autocast, of images [N, 3, H, W]: constants for autograd."""
        with torch.inference_mode():
            embeddings = F.normalize(self.head(self.encoder(images)).float(), dim=1)
        return embeddings.clone()  # an inference tensor itself cannot be saved for a backward pass

    def fold_batch_norm(self) -> None:
        """Folds the encoder's BN layers into its convolutions, in place: the same embeddings up to rounding, in less time."""
        fold_batch_norm(self.encoder)


def build_teacher(config: TeacherConfig, teacher_ssl: str) -> Teacher:
    """The teacher with its weights, from `config.checkpoint` or else from the official file, downloaded once into the cache.

    The cache is the folder in the environment variable SEED_CACHE, otherwise ~/.cache/seed_exp.

    Args:
        config: `name` is a key of TEACHERS; for `run`, `checkpoint` is a run folder or student file.
        teacher_ssl: Key of TEACHER_SSL, the convention of the checkpoint; a `run` needs none and ignores it.

    Raises:
        ValueError: no file is given or can be downloaded, or it does not fit the network or the convention.
        FileNotFoundError: `config.checkpoint` does not exist.
    """
    spec = lookup(TEACHERS, config.name, "teacher")
    if spec.network is None:
        return _teacher_of_run(config)
    path = _official_file(config.name, spec, teacher_ssl) if config.checkpoint is None else Path(config.checkpoint)
    with torch.device("meta"):
        encoder = NETWORKS[spec.network]()
    head = load_weights(read_checkpoint(path), teacher_ssl, encoder, path)
    last = next(layer for layer in reversed(list(head.modules())) if isinstance(layer, nn.Linear))
    teacher = Teacher(encoder, head, last.out_features)
    teacher.fingerprint = file_hash(path)
    return teacher


def untrained_teacher(config: TeacherConfig, teacher_ssl: str) -> Teacher:
    """The network and head of `build_teacher`, with random weights and no file: for what depends on shapes alone.

    A `run` is read from its checkpoint, which says what network it is. Arguments as in `build_teacher`.
    """
    spec = lookup(TEACHERS, config.name, "teacher")
    if spec.network is None:
        return _teacher_of_run(config)
    encoder = NETWORKS[spec.network]()
    layers = spec.head or lookup(TEACHER_SSL, teacher_ssl, "teacher_ssl").heads[0]
    if layers == "Linear":
        return Teacher(encoder, nn.Linear(encoder.num_features, EMBEDDING_DIM), EMBEDDING_DIM)
    head = projection_head(encoder.num_features, spec.hidden_dim, EMBEDDING_DIM)
    if "BatchNorm1d" in layers:
        head.insert(1, nn.BatchNorm1d(spec.hidden_dim))
    return Teacher(encoder, head, EMBEDDING_DIM)


def _teacher_of_run(config: TeacherConfig) -> Teacher:
    if config.checkpoint is None:
        raise ValueError("teacher=run needs teacher.checkpoint=PATH, a run folder of pretrain or distill or a student file")
    path = Path(config.checkpoint)
    names = list(student_files(path))
    if config.student is None and len(names) > 1:
        raise ValueError(f"{path} holds several networks; choose one with teacher.student={'|'.join(names)}")
    name = config.student or names[0]
    student, header = load_students(path, [name])[name]
    teacher = Teacher(student.encoder, student.head, student.embedding_dim)
    teacher.fingerprint = file_hash(student_files(path)[name])
    teacher.normalisation = header["eval_views"]["mean"], header["eval_views"]["std"]
    return teacher


def _official_file(name: str, spec: TeacherSpec, teacher_ssl: str) -> Path:
    if spec.url is None:
        raise ValueError(f"teacher={name} has no lasting address to download from; give its file with teacher.checkpoint=PATH")
    if teacher_ssl != spec.teacher_ssl:
        raise ValueError(f"the official file of teacher={name} needs teacher_ssl={spec.teacher_ssl}, got {teacher_ssl}")
    cache = Path(os.environ.get("SEED_CACHE") or Path.home() / ".cache" / "seed_exp")
    return download(spec.url, cache / spec.url.rsplit("/", 1)[-1], spec.hash)
