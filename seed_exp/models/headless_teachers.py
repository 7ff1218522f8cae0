"""Teachers without a projection head: encoders of timm, and networks from code of the user's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from seed_exp.base.files import file_hash
from seed_exp.config.schema import TeacherConfig
from seed_exp.models.custom import custom_encoder, source_hash
from seed_exp.models.encoders import UnknownNetworkError, input_spec, load_encoder, timm_encoder
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.inputs import IMAGENET
from seed_exp.models.student_header import exported_network
from seed_exp.models.students import refuse_near_twin
from seed_exp.models.timm_teachers import TIMM_TEACHERS
from seed_exp.models.weights import read_checkpoint, tensors_hash


def timm_teacher(config: TeacherConfig, trained: bool) -> Teacher:
    """A network of timm; its embedding is its pooled feature.

    Args:
        config: `network` is `timm`, or a key of TIMM_TEACHERS, whose name in timm is known.
        trained: Whether weights are to be loaded.

    Raises:
        ValueError: timm has no such network, its weights cannot be downloaded, or the file of
            weights does not fit.
    """
    if config.network in TIMM_TEACHERS:
        known = TIMM_TEACHERS[config.network].name
        config = replace(config, network="timm", name=known)
    downloaded = trained and config.checkpoint is None
    try:
        encoder = timm_encoder(config.name, pretrained=downloaded)
    except UnknownNetworkError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{error}, "
            "or give its name in timm and a file with its weights: teacher.checkpoint=PATH"
        ) from error
    fingerprint = tensors_hash(encoder.state_dict()) if downloaded else ""
    if trained and config.checkpoint is not None:
        path = Path(config.checkpoint)
        refuse_near_twin(path, "timm", exported_network(path))
        fingerprint = _load(encoder, path, str(config.name))
    return _teacher(encoder, fingerprint)


def custom_teacher(config: TeacherConfig, trained: bool) -> Teacher:
    """The network that a factory of the user's returns; its embedding is its output.

    Its weights are those that the factory gives it, unless `config.checkpoint` is a file of them.
    Views are normalised as for ImageNet, or as timm says if the network is one of timm's.

    Raises:
        ValueError: as `custom_encoder`, or the file of weights does not fit.
    """
    encoder = custom_encoder(config.network, {}, "teacher.network")
    code = source_hash(config.network, encoder)
    if trained and config.checkpoint is not None:
        weights = _load(encoder, Path(config.checkpoint), config.network)
    else:
        weights = tensors_hash(encoder.state_dict())
    return _teacher(encoder, f"{weights} by code {code}" if trained else "")


def _load(encoder: nn.Module, path: Path, name: str) -> str:
    """Fills the encoder from a file, and returns the file's hash."""
    load_encoder(encoder, read_checkpoint(path), name, path)
    return file_hash(path)


def _teacher(encoder: nn.Module, fingerprint: str) -> Teacher:
    num_features: int = encoder.num_features  # type: ignore[assignment]
    expects = input_spec(encoder) if hasattr(encoder, "pretrained_cfg") else IMAGENET
    teacher = Teacher(encoder, nn.Identity(), num_features, expects)
    teacher.fingerprint = fingerprint
    return teacher
