"""The networks that are trained: encoders by name, with projection head, and the student files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.base.files import atomic_write, file_hash
from seed_exp.base.redaction import redact_all
from seed_exp.base.registry import Registry, lookup
from seed_exp.config.schema import StudentConfig
from seed_exp.config.schema.networks import is_place
from seed_exp.models.convnet import ConvNet
from seed_exp.models.custom import custom_encoder, refuse_untrusted, source_hash
from seed_exp.models.encoders import (
    EFFICIENTNET_TRAINING,
    MOBILENET_DROP_RATE,
    efficientnet_b1,
    load_encoder,
    mobilenetv3_large,
    timm_encoder,
)
from seed_exp.models.heads import projection_head
from seed_exp.models.initialisation import initialise_as_released
from seed_exp.models.inputs import IMAGENET_MEAN, IMAGENET_STD
from seed_exp.models.maps import feature_maps
from seed_exp.models.released import RELEASED, is_released, released_tensors
from seed_exp.models.student_header import exported_network, read_header, recorded_config
from seed_exp.models.weights import mismatch, read_checkpoint, tensors_hash

# Encoders: forward(images [N, 3, H, W]) returns pooled features [N, num_features].
_STUDENTS: dict[str, Callable[[StudentConfig], nn.Module]] = {
    "resnet18": lambda _: timm_encoder("resnet18"),
    "resnet34": lambda _: timm_encoder("resnet34"),
    "resnet50": lambda _: timm_encoder("resnet50"),
    "mobilenetv3_large": lambda config: mobilenetv3_large(
        MOBILENET_DROP_RATE if config.init_rule == "released" else 0.0
    ),
    "efficientnet_b0": lambda _: timm_encoder("tf_efficientnet_b0", **EFFICIENTNET_TRAINING),
    "efficientnet_b1": lambda _: efficientnet_b1(),
    "timm": lambda config: timm_encoder(config.name, pretrained=config.pretrained, **config.args),
    "convnet_w2": lambda _: ConvNet(width=2),
    "convnet_w32": lambda _: ConvNet(width=32),
}
STUDENTS: Registry[Callable[[StudentConfig], nn.Module]] = Registry("STUDENTS", _STUDENTS)


NEAR_TWINS = {"efficientnet_b1": "tf_efficientnet_b1", "mobilenetv3_large": "mobilenetv3_large_100"}
"""Student -> network of timm with the same tensor names and shapes but another computation."""


class Student(nn.Module):
    """An encoder and its projection head: the network that distillation and pre-training train.

    Args:
        encoder: Network from STUDENTS, with attribute `num_features`.
        hidden_dim: Hidden width of the head; 0 = one linear layer; None = `encoder.num_features`.
        embedding_dim: Width D of the embedding.
        deep_head: Whether the head is SimReg's deep one.
    """

    def __init__(
        self,
        encoder: nn.Module,
        hidden_dim: int | None,
        embedding_dim: int,
        *,
        deep_head: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_features: int = encoder.num_features  # type: ignore[assignment]
        self.embedding_dim = embedding_dim
        self.head = projection_head(self.num_features, hidden_dim, embedding_dim, deep=deep_head)
        self.map_head: nn.Conv2d | None = None
        """Predicts the teacher's maps from its own; only while it is trained with a dense term."""
        self.fingerprints: dict[str, str] = {}
        """Hash of what it is made of, besides this package and files, by option: custom code, or
        pretrained weights."""

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [N, num_features] of images [N, 3, H, W]."""
        features: Tensor = self.encoder(images)
        return features

    def add_map_head(self, width: int, their_width: int) -> None:
        """Gives it a linear map, the same at every position, from its maps to the teacher's.

        Args:
            width: Channels of its encoder's maps.
            their_width: Channels of the teacher's maps.
        """
        self.map_head = nn.Conv2d(width, their_width, 1)

    def forward(
        self, images: Tensor, *, unit_length: bool = True, with_map: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embeddings [N, D], float32 also under autocast, of images [N, 3, H, W].

        Args:
            images: The images.
            unit_length: Whether embeddings have unit length, or that of the head's output.
            with_map: Whether the teacher's maps that it predicts, [N, C, h, w], come with them; for
                square images and a student with a map head.
        """
        if not with_map:
            return self._embeddings(self.features(images), unit_length)
        assert self.map_head is not None
        features, maps = feature_maps(self.encoder, images)
        return self._embeddings(features, unit_length), self.map_head(maps)

    def _embeddings(self, features: Tensor, unit_length: bool) -> Tensor:
        embeddings: Tensor = self.head(features).float()
        return F.normalize(embeddings, dim=1) if unit_length else embeddings


def build_student(config: StudentConfig, embedding_dim: int) -> Student:
    """A student with random weights, or with those of `config.init` in its encoder.

    Random weights follow the rule `config.init_rule`. The encoder of a custom network is what its
    factory returns, which is imported: the caller answers for `config.network`.
    The head starts from `config.init` too if that is a student whose head has the same widths;
    otherwise it is random.

    Raises:
        ValueError: unknown network, a factory that returns none, or the weights of `init` do not
            fit it or cannot be downloaded.
        FileNotFoundError: `init` does not exist.
    """
    if config.name is not None and config.network != "timm":
        raise ValueError(
            f"students.<name>.name={config.name} is only for network=timm; "
            f"this network is {config.network}"
        )
    is_custom = is_place(config.network)
    encoder = (
        custom_encoder(config.network, config.args, "students.<name>.network")
        if is_custom
        else lookup(STUDENTS, config.network, "student network")(config)
    )
    student = Student(encoder, config.hidden_dim, embedding_dim, deep_head=bool(config.deep_head))
    if is_custom:
        student.fingerprints["network"] = source_hash(config.network, encoder)
    if config.pretrained:
        student.fingerprints["pretrained"] = tensors_hash(encoder.state_dict())
    if config.init_rule == "released":
        initialise_as_released(config.network, student.encoder, student.head)
    if config.init is not None:
        _start_from(Path(config.init), student, config)
    return student


def save_student(
    path: Path,
    student: Student,
    config: StudentConfig,
    metadata: dict[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a student into one safetensors file, atomically.

    The header's entry `seed_exp` is JSON: `metadata` with the additional keys `student` (the
    config), `embedding_dim` and, for a custom network, `source` (the hash of its code). A map head
    serves training only and is left out.

    Args:
        path: The file.
        student: The student.
        config: The options that made it.
        metadata: JSON entries for the header.
        tensors: A `state_dict()` of the student to write; None = its present weights.
    """
    header = {**metadata, "student": asdict(config), "embedding_dim": student.embedding_dim}
    if source := student.fingerprints.get("network"):
        header["source"] = source
    header = redact_all(header)  # these files are published; addresses in options may be signed
    present = student.state_dict() if tensors is None else tensors
    # Copies, because some networks tie weights and safetensors refuses tensors that share memory.
    tensors = {
        key: tensor.detach().to("cpu", copy=True).contiguous()
        for key, tensor in present.items()
        if not key.startswith("map_head.")
    }
    with atomic_write(path) as file:
        file.write(save(tensors, metadata={"seed_exp": json.dumps(header)}))


def load_students(
    run: Path, names: list[str] | None = None
) -> dict[str, tuple[Student, dict[str, Any]]]:
    """The students of a run by name, each with the header of its file.

    A header holds the metadata given to `save_student`, `student`, `embedding_dim` and `sha256`.

    Args:
        run: Run folder of `distill` or `pretrain`, one student file, or a file with a student that
            SEED released.
        names: Names of the students to load; None = all.

    Raises:
        ValueError: `run` holds no students or none of that name, a file is broken or holds no
            student, or its network is code of yours that you did not say you trust, or that has
            changed.
        FileNotFoundError: there is no such folder or file.
    """
    files = student_files(run)
    selected = (
        files
        if names is None
        else {name: lookup(files, name, f"student of {run}") for name in names}
    )
    return {name: _load_whole(path) for name, path in selected.items()}


def student_files(run: Path) -> dict[str, Path]:
    """Student files by name: `run` itself if it is a file, or those of the run folder `run`.

    Raises:
        ValueError: the run folder holds no students.
        FileNotFoundError: there is no such folder or file.
    """
    if run.is_file():
        return {Path(run.name.removesuffix(".tar")).stem: run}  # SEED's files are called .pth.tar
    if not run.exists():
        raise FileNotFoundError(f"no run folder or student file {run}")
    files = {path.stem: path for path in sorted((run / "students").glob("*.safetensors"))}
    if not files:
        raise ValueError(
            f"{run} holds no students; "
            f"expected {run}/students/<name>.safetensors of distill or pretrain"
        )
    return files


def _load_whole(path: Path) -> tuple[Student, dict[str, Any]]:
    """The student and its header with the file's hash.

    Reads again until all three are of the same file, which a running training replaces at times.
    """
    while True:
        before = file_hash(path)
        student, header = _load_student(path)
        if file_hash(path) == before:
            return student, {**header, "sha256": before}


def _load_student(path: Path) -> tuple[Student, dict[str, Any]]:
    tensors = read_checkpoint(path)
    header = read_header(path)
    if header is None and is_released(tensors):
        header, tensors = _released_student(path, tensors)
    if header is None:
        raise ValueError(
            f"{path} is no student file; "
            "expected <run>/students/<name>.safetensors of distill or pretrain"
        )
    config = replace(recorded_config(header), init=None, pretrained=False)
    if isinstance(config.network, str) and is_place(config.network):  # a header may say anything
        refuse_untrusted(config.network, path)
    try:
        # On the meta device, so that huge sizes in a bad header take no memory.
        with torch.device("meta"):
            twin = build_student(config, header["embedding_dim"])
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} has a header that describes no student ({reason})") from None
    if (source := twin.fingerprints.get("network")) != header.get("source"):
        raise ValueError(
            f"{path} was trained with other code of {config.network} (hash {header.get('source')}) "
            f"than there is now ({source}); check out the code that trained it"
        )
    expected = twin.state_dict()
    if problem := mismatch(expected, tensors):
        raise ValueError(f"{path} does not fit its own network {config.network}: {problem}")
    student = build_student(config, header["embedding_dim"])
    student.load_state_dict(tensors)
    return student, header


def _released_student(
    path: Path, checkpoint: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and tensors of a student that SEED released, as in our own files.

    The file's keys tell which network it is.
    """
    for network in RELEASED:
        tensors = released_tensors(checkpoint, network)
        first, last = tensors.get("head.0.weight"), tensors.get("head.2.weight")
        if not (
            isinstance(first, Tensor) and isinstance(last, Tensor) and first.ndim == last.ndim == 2
        ):
            raise ValueError(
                f"{path} holds a student of SEED without its head module.student.fc; "
                "expected fc.0 and fc.2"
            )
        config = StudentConfig(network, hidden_dim=len(first))
        with torch.device("meta"):
            expected = build_student(config, len(last)).state_dict()
        if not mismatch(expected, tensors):
            views = {
                "eval_size": 224,
                "eval_resize": 256,
                "mean": IMAGENET_MEAN,
                "std": IMAGENET_STD,
            }
            header = {"student": asdict(config), "embedding_dim": len(last), "eval_views": views}
            return {**header, "command": "released by SEED", "step": None}, tensors
    raise ValueError(f"{path} fits none of the students that SEED released: {', '.join(RELEASED)}")


def _start_from(path: Path, student: Student, config: StudentConfig) -> None:
    """Fills the encoder from the file or run at `path`, and the head if there is one that fits."""
    if path.is_dir():
        path = _student_like(config, path)
    tensors, header = read_checkpoint(path), read_header(path)
    if is_released(tensors):
        if config.network not in RELEASED:
            raise ValueError(
                f"{path} is a student that SEED released, one of {', '.join(RELEASED)}, "
                f"not {config.network}"
            )
        tensors = released_tensors(tensors, config.network)
    else:
        refuse_near_twin(
            path,
            config.network,
            exported_network(path) if header is None else header["student"]["network"],
        )
        if header is None:
            load_encoder(student.encoder, tensors, config.name or config.network, path)
            return
    parts = {
        part: {
            key.removeprefix(part): tensor
            for key, tensor in tensors.items()
            if key.startswith(part)
        }
        for part in ("encoder.", "head.")
    }
    load_encoder(student.encoder, parts["encoder."], config.name or config.network, path)
    if not mismatch(student.head.state_dict(), parts["head."]):
        student.head.load_state_dict(parts["head."])


def refuse_near_twin(path: Path, network: str, found: str | None) -> None:
    """Refuses weights of another network whose tensors have the same names, see NEAR_TWINS.

    Args:
        path: The file.
        network: Key of STUDENTS: the network that is to get the weights.
        found: The network that the file claims to hold; None if it does not say.

    Raises:
        ValueError: the file holds, or may hold, the twin's weights.
    """
    if network in NEAR_TWINS and found in (None, "timm"):
        twin = network
    elif network == "timm" and found in NEAR_TWINS:
        twin = found
    else:
        return
    raise ValueError(
        f"{path} holds weights of {found or 'an unknown network'}, not of {network}: "
        f"timm's {NEAR_TWINS[twin]} and SEED's {twin} have tensors of the same names "
        "and compute different features. Take timm's with network=timm and its name there, "
        f"SEED's from a student file of {twin}"
    )


def _student_like(config: StudentConfig, run: Path) -> Path:
    """The only student of the run that has the network of `config`; averages are passed over."""
    files = student_files(run)
    headers = {name: read_header(path) for name, path in files.items()}
    fitting = [
        name
        for name, header in headers.items()
        if header
        and (header["student"]["network"], header["student"]["name"])
        == (config.network, config.name)
        and "ema_decay" not in header
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"{run} holds {len(fitting)} students with network {config.name or config.network} "
            f"({', '.join(files)} in all); "
            f"give a student's file, e.g. init={next(iter(files.values()))}"
        )
    return files[fitting[0]]
