"""The formats that a student is exported to: how to write each, and lines of Python that use it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.base.files import atomic_write, write_json
from seed_exp.base.optional import optional
from seed_exp.base.registry import lookup
from seed_exp.config.schema import StudentConfig
from seed_exp.exporting.loaders import (
    CHANGES,
    IN_TORCHVISION,
    LOADER,
    WEIGHTS,
    architecture_of,
    loader_file,
    timm_lines,
    timm_options,
    torchvision_lines,
)
from seed_exp.exporting.parity import LIMIT, relative_error, results_of
from seed_exp.exporting.reduced import in_float16, in_int8
from seed_exp.models.folding import reparameterised
from seed_exp.models.maps import feature_maps, has_maps
from seed_exp.models.students import Student

ONNX, PROGRAM = "model.onnx", "model.pt2"
ONNX_FLOAT16, ONNX_INT8 = "model_fp16.onnx", "model_int8.onnx"


@dataclass(frozen=True)
class Subject:
    """A network to export, and the images on which its files are tried."""

    name: str
    """Name of the student."""
    student: Student
    """The network, in evaluation mode, on the CPU."""
    config: StudentConfig
    """Options of the student."""
    eval_views: dict[str, Any]
    """Preparation of images for the network: eval_size, eval_resize, mean, std."""
    images: Tensor
    """Images prepared in this way [N, 3, S, S], N >= 2, float32."""
    head: bool
    """Whether formats that hold a whole program return embeddings too."""
    calibration: Callable[[], Tensor]
    """Returns images with which ranges of activations are measured, prepared like `images`."""
    maps: bool = False
    """Whether formats that hold a whole program return feature maps too."""

    @cached_property
    def onnx(self) -> Any:
        """The network as ONNX in float32, made once for all formats that start from it."""
        program = torch.onnx.export(
            _program(self),
            input_names=["images"],
            output_names=_outputs(self),
            external_data=False,
            verbose=False,
        )
        assert program is not None
        return program.model_proto

    @property
    def architecture(self) -> str | None:
        """Name of the network in timm; None if timm does not have it."""
        return architecture_of(self.config, self.student.encoder)


@dataclass(frozen=True)
class Format:
    """An export format."""

    file: str
    """Name of the file that holds the weights."""
    has: Callable[[Subject], bool]
    """Whether the network can be exported to this format."""
    write: Callable[[Subject, Path], None]
    """Writes the format's files into a folder."""
    lines: Callable[[Subject], str]
    """Lines of Python that, run in that folder, turn `images` into `features`; a program with head
    gives `embeddings` too.
    """
    is_program: bool = False
    """Whether the file holds the whole computation, and therefore can include the head."""
    min_cosine: float | None = None
    """Smallest mean cosine of the file's features to the network's, for a format of fewer bits.

    None = the file gives the network's own features, up to LIMIT.
    """


def formats_of(subject: Subject, names: Sequence[str] | None) -> dict[str, Format]:
    """Returns the formats `names`, by name; for None, all that give the network's own features.

    Raises:
        ValueError: a format is unknown, the network does not have it, head or maps are wanted and
            no format can hold them, or the network has no maps.
    """
    having = {name: each for name, each in FORMATS.items() if each.has(subject)}
    chosen = (
        {name: each for name, each in having.items() if each.min_cosine is None}
        if names is None
        else {name: lookup(FORMATS, name, "export format") for name in names}
    )
    for name in chosen.keys() - having.keys():
        raise ValueError(
            f"{name} has no network that equals {subject.name}; choose formats from "
            f"{', '.join(having)}"
        )
    wanted = [option for option in ("head", "maps") if getattr(subject, option)]
    if wanted and not any(each.is_program for each in chosen.values()):
        raise ValueError(
            f"{wanted[0]}=true needs a format that holds more than the encoder's weights; add onnx "
            "or torch_export to formats"
        )
    if subject.maps and not has_maps(subject.student.encoder):
        raise ValueError(
            f"maps=true needs an encoder with forward_features and forward_head, as those of timm "
            f"have; {subject.name} has none"
        )
    return chosen


def export_formats(subject: Subject, formats: dict[str, Format], folder: Path) -> dict[str, float]:
    """Writes the files of `formats` into `folder`, and reads each back as a user would.

    Returns:
        Relative error of each format, by name.

    Raises:
        ValueError: a file cannot be read, its output is not finite, or it differs from the
            student's although the format has all its bits; or a library is missing.
    """
    with torch.no_grad():
        expected = {
            "features": subject.student.features(subject.images),
            "embeddings": subject.student(subject.images),
        }
        if subject.maps:
            expected["maps"] = feature_maps(subject.student.encoder, subject.images)[1]
    errors = {}
    for name, each in formats.items():
        each.write(subject, folder)
        given = results_of(each.lines(subject), subject.images, folder)
        wanted = _outputs(subject) if each.is_program else ["features"]
        errors[name] = max(relative_error(given[kind], expected[kind]) for kind in wanted)
        if problem := _refused(subject, each, errors[name], expected["features"]):
            raise ValueError(
                f"{each.file} as {name} of {subject.name} does not give the network's own output: "
                f"{problem}. Nothing was exported"
            )
    return errors


def _refused(subject: Subject, tried: Format, error: float, features: Tensor) -> str | None:
    """The reason for which a file with this relative error is refused; None for a good one."""
    if tried.min_cosine is not None:  # how far fewer bits lead is measured on more images
        return "numbers are not finite, or their shape differs" if math.isinf(error) else None
    if error <= LIMIT:
        return None
    return (
        f"relative error {error:.2g} on {len(subject.images)} images, at most {LIMIT:g} is "
        f"allowed, and float32 itself is {_rounding(subject, features):.2g} away from float64"
    )


def _rounding(subject: Subject, features: Tensor) -> float:
    """Relative error of the network's own features [N, num_features] in float32, against float64.

    A network for which it is large also differs between programs.
    """
    with torch.no_grad():
        exact = copy.deepcopy(subject.student).double().features(subject.images.double())
    return relative_error(features, exact.float())


def hub_config(subject: Subject) -> dict[str, Any]:
    """Content of config.json, with which timm loads the folder from disk or from the hub."""
    encoder = subject.student.encoder
    size, resize = subject.eval_views["eval_size"], subject.eval_views["eval_resize"]
    crop_pct = size / resize
    if math.floor(size / crop_pct) < resize:  # timm resizes to floor(size / crop_pct)
        crop_pct = math.nextafter(crop_pct, 0)
    known: dict[str, Any] = encoder.pretrained_cfg  # type: ignore[assignment]
    options = timm_options(subject.config, encoder)
    takes_sizes = bool(options.get("dynamic_img_size"))
    return {
        "architecture": architecture_of(subject.config, encoder),
        "num_classes": options.pop("num_classes"),
        "num_features": subject.student.num_features,
        "model_args": options,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": bool(known.get("fixed_input_size")) and not takes_sizes,
            "interpolation": "bilinear",
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": subject.eval_views["mean"],
            "std": subject.eval_views["std"],
            "num_classes": 0,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }


class _Program(nn.Module):
    """Maps images to their features and, if these are wanted, embeddings and feature maps.

    Parallel branches of the encoder are one layer each.
    """

    def __init__(self, student: Student, *, head: bool, maps: bool) -> None:
        super().__init__()
        self.encoder = reparameterised(student.encoder)
        self.head, self.maps = student.head if head else None, maps

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, *maps = (
            feature_maps(self.encoder, images) if self.maps else (self.encoder(images),)
        )
        embeddings = [] if self.head is None else [F.normalize(self.head(features), dim=1)]
        return (features, *embeddings, *maps)


def _write_weights(subject: Subject, folder: Path) -> None:
    encoder = subject.student.encoder
    # Clones, because safetensors refuses the weights that some networks tie.
    tensors = {key: tensor.clone().contiguous() for key, tensor in encoder.state_dict().items()}
    metadata = {"format": "pt", "network": subject.config.network}
    # Not save_file, which makes files that only their owner may read.
    (folder / WEIGHTS).write_bytes(save(tensors, metadata))
    loader = loader_file(subject.config, encoder)
    if loader is None:
        write_json(folder / "config.json", hub_config(subject))
    else:  # with a config.json, timm would load its own network, which differs
        (folder / LOADER).write_text(loader)


def _program(subject: Subject) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim("batch")}
    program = _Program(subject.student, head=subject.head, maps=subject.maps)
    return torch.export.export(program, (subject.images[:2],), dynamic_shapes=(batch,))


def _write_program(subject: Subject, folder: Path) -> None:
    program = _program(subject)
    # Not by its path: torch would make other errors of those of a disk.
    with atomic_write(folder / PROGRAM) as file:
        torch.export.save(program, file)


def _write_onnx(subject: Subject, folder: Path) -> None:
    _save_onnx(subject, folder / ONNX, lambda model: model)


def _write_float16(subject: Subject, folder: Path) -> None:
    _save_onnx(subject, folder / ONNX_FLOAT16, in_float16)


def _write_int8(subject: Subject, folder: Path) -> None:
    _save_onnx(subject, folder / ONNX_INT8, lambda model: in_int8(model, subject.calibration()))


def _save_onnx(subject: Subject, path: Path, change: Callable[[Any], Any]) -> None:
    with optional("formats=[onnx]"):
        import onnx  # noqa: F401  (torch needs it only after half of the work)
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    path.write_bytes(change(subject.onnx).SerializeToString())


FILES = [WEIGHTS, LOADER, ONNX, ONNX_FLOAT16, ONNX_INT8, PROGRAM, "config.json"]
"""Names of all files that the formats may write; the model card comes on top."""


def _outputs(subject: Subject) -> list[str]:
    given = {"features": True, "embeddings": subject.head, "maps": subject.maps}
    return [name for name, is_given in given.items() if is_given]


def _onnx_format(
    file: str, write: Callable[[Subject, Path], None], min_cosine: float | None = None
) -> Format:
    return Format(
        file,
        has=lambda _: True,
        write=write,
        lines=lambda subject: (
            f"""import onnxruntime
session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
{_left_side(subject)} = session.run(None, {{"images": images.numpy()}})"""
        ),
        is_program=True,
        min_cosine=min_cosine,
    )


def _left_side(subject: Subject) -> str:
    first, *others = _outputs(subject)
    return ", ".join([first, *others]) if others else f"({first},)"


FORMATS: dict[str, Format] = {
    "timm": Format(
        WEIGHTS,
        has=lambda subject: subject.architecture is not None,
        write=_write_weights,
        lines=lambda subject: (
            timm_lines(subject.config, subject.student.encoder) + "\nfeatures = model(images)"
        ),
    ),
    "torchvision": Format(
        WEIGHTS,
        has=lambda subject: (
            subject.config.network not in CHANGES
            and not subject.config.args
            and subject.architecture in IN_TORCHVISION
        ),
        write=_write_weights,
        lines=lambda subject: (
            torchvision_lines(subject.architecture) + "\nfeatures = model(images)"
        ),
    ),
    "onnx": _onnx_format(ONNX, _write_onnx),
    "onnx_fp16": _onnx_format(ONNX_FLOAT16, _write_float16, min_cosine=0.999),
    "onnx_int8": _onnx_format(ONNX_INT8, _write_int8, min_cosine=0.95),
    "torch_export": Format(
        PROGRAM,
        has=lambda _: True,
        write=_write_program,
        lines=lambda subject: (
            f"""import torch
program = torch.export.load("{PROGRAM}").module()
{_left_side(subject)} = program(images)"""
        ),
        is_program=True,
    ),
}
"""Export formats by name.

TorchScript is not among them, because torch has deprecated it in favour of torch.export.
"""
