"""A trained encoder with its images' transform: features in a line."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from seed_exp.base.average_names import without_averages
from seed_exp.config.schema import Precision, ViewsConfig
from seed_exp.data.decode import decode, pixels_of
from seed_exp.engine import distributed
from seed_exp.engine.precision import autocast
from seed_exp.evaluation.results import results_about, run_home
from seed_exp.evaluation.setup import load_frozen
from seed_exp.exporting.card import licence_of
from seed_exp.models.student_header import read_header
from seed_exp.models.students import student_files
from seed_exp.python.undisturbed import undisturbed
from seed_exp.views.recipe import EvalViews

ImageLike = Any
"""A PIL image, the path of an image file, or a tensor [3, H, W]."""


@dataclass(frozen=True)
class Info:
    """Facts about a trained encoder; None = unknown."""

    name: str
    """Name of the student."""
    file: Path
    """File that it was read from."""
    network: str
    """Its architecture: a student of this package, or a name in timm."""
    num_parameters: int
    """Parameters of the encoder."""
    num_features: int
    """Width of its features."""
    image_size: int
    """Side of the images that it is evaluated on, in pixels."""
    method: str
    """Command that trained it, and its objective: "distill, seed"."""
    teacher: str | None
    """Teacher of a distillation."""
    images: str | None
    """Fingerprint of the training images."""
    steps: int | None
    """Steps of its training."""
    licence: str
    """Licence of the weights, as far as it is known, and where it comes from."""
    results: dict[str, dict[str, float]]
    """Percent, by measure, by evaluation: those of exactly these weights in the run folder."""
    options: dict[str, Any] = field(repr=False)
    """Options of the training that decide results: {"objective.tau_teacher": 0.01, ...}."""


@dataclass(frozen=True)
class Transform:
    """Turns an image into the encoder's input, float32 [3, S, S]: resized, cropped, normalised.

    The pixels are those that the evaluations of this package see. It can be pickled: give it to a
    Dataset.
    """

    views: ViewsConfig
    """Sizes, mean and standard deviation; the other options have no effect."""

    def __call__(self, image: ImageLike) -> Tensor:
        """The input for a PIL image, an image file or pixels, uint8 [3, H, W].

        Raises:
            ValueError: the image cannot be read, or is none of these.
        """
        return EvalViews(self.views).inputs([_pixels(image)])[0]

    def __repr__(self) -> str:
        views = self.views
        sizes = f"resize={views.eval_resize}, crop={views.eval_size}"
        return f"Transform({sizes}, mean={views.mean}, std={views.std})"


@dataclass(frozen=True)
class Encoder:
    """A trained encoder in evaluation mode, frozen, from `load`."""

    encoder: nn.Module
    """Maps inputs [N, 3, S, S] to features [N, D]; `requires_grad_(True)` lets it learn on."""
    transform: Transform
    """Makes an input of an image."""
    info: Info
    """What is known about it."""
    device: torch.device
    """Where it computes."""

    def __repr__(self) -> str:
        return f"Encoder({self.info}, device={self.device})"

    @torch.no_grad()
    def features(self, images: Any, *, batch_size: int = 256) -> Tensor:
        """Features [N, D] of images, float32 on the CPU.

        Args:
            images: A PIL image, the path of an image file, or a tensor; or any nesting of lists,
                tuples and other iterables of these, such as batches. A tensor of uint8, [3, H, W]
                or [N, 3, H, W], holds pixels, which are transformed; one of floating-point numbers
                holds inputs, as `transform` returns them.
            batch_size: Images per forward pass.

        Raises:
            ValueError: an image cannot be read, or is none of these.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        parts = [torch.empty(0, self.info.num_features)]
        was_training = self.encoder.training
        self.encoder.eval()
        try:
            inputs = (self._input(image) for image in _single(images))
            while batch := list(itertools.islice(inputs, batch_size)):
                with autocast(Precision.auto, self.device):
                    features = self.encoder(_stacked(batch).to(self.device))
                parts.append(features.float().cpu())
        finally:
            self.encoder.train(was_training)
        return torch.cat(parts)

    def _input(self, image: ImageLike) -> Tensor:
        if isinstance(image, Tensor) and image.is_floating_point():
            return image.detach().float().cpu()
        return self.transform(image)


def load(
    run: str | os.PathLike[str], student: str | None = None, *, device: str = "auto"
) -> Encoder:
    """A trained encoder, with the transform that its images need.

    Args:
        run: A run folder of `distill` or `pretrain`, a student's file, a file that SEED released,
            or what `seed_exp.distill` returned.
        student: Name of the student, where the run has several, or NAME_ema of its average.
        device: auto = a GPU if there is one; or cpu, cuda.

    Raises:
        ValueError: there is no student, there are several, or a file is broken or newer than this
            version.
        FileNotFoundError: there is no such folder or file.

    Examples:
        >>> encoder = seed_exp.load(run)  # a folder; here it is what seed_exp.distill returned
        >>> encoder.info.network, encoder.info.num_features, encoder.info.method
        ('convnet_w2', 16, 'distill, seed')
        >>> features = encoder.features([photo, photo.rotate(90)])  # of PIL
        >>> features.shape, features.dtype
        (torch.Size([2, 16]), torch.float32)
        >>> encoder.encoder(encoder.transform(photo)[None]).shape
        torch.Size([1, 16])
    """
    with undisturbed():
        path = Path(run)
        files = student_files(path)
        own = without_averages(files)
        if student is None and len(own) > 1:
            raise ValueError(
                f"{path} holds several students; choose one with student=: {', '.join(files)}"
            )
        on = distributed.local_device(device)
        frozen = load_frozen(path, own if student is None else [student], on)
        ((name, loaded),) = frozen.students.items()
        info = _info(name, files[name], loaded.encoder, frozen.record[name], frozen.views)
        return Encoder(loaded.encoder, Transform(frozen.views), info, on)


def _info(
    name: str, file: Path, encoder: nn.Module, record: dict[str, Any], views: ViewsConfig
) -> Info:
    header = read_header(file) or {"student": record, "command": record["command"]}
    options: dict[str, Any] = header.get("options", {})
    objective = options.get("objective.name")
    results: dict[str, dict[str, float]] = {}
    for content, numbers in results_about(run_home(file) / "results", name, record["sha256"]):
        results.setdefault(content["evaluation"], {}).update(numbers)
    return Info(
        name=name,
        file=file,
        network=record["name"] or record["network"],
        num_parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        num_features=int(encoder.num_features),  # type: ignore[arg-type]
        image_size=views.eval_size,
        method=record["command"] if objective is None else f"{record['command']}, {objective}",
        teacher=options.get("teacher.name") or options.get("teacher.network"),
        images=header.get("inputs", {}).get("data"),
        steps=record["step"],
        licence=licence_of(header)[1],
        results=results,
        options=options,
    )


def _single(images: Any) -> Iterator[ImageLike]:
    """The images in any nesting, one by one."""
    if isinstance(images, Tensor) and images.ndim == 4:
        yield from images
    elif isinstance(images, Image.Image | str | os.PathLike | Tensor):
        yield images
    elif isinstance(images, Iterable) and not hasattr(images, "__array_interface__"):
        for image in images:
            yield from _single(image)
    else:
        raise ValueError(_expected(images))


def _pixels(image: ImageLike) -> Tensor:
    if isinstance(image, Image.Image):
        return pixels_of(image)
    if isinstance(image, str | os.PathLike):
        try:
            content = Path(image).read_bytes()
        except OSError as error:
            hint = "; seed_exp.embed takes folders" if Path(image).is_dir() else ""
            raise ValueError(f"cannot read image {image}: {error.strerror}{hint}") from error
        return decode(content, str(image))
    if isinstance(image, Tensor) and image.dtype is torch.uint8 and _is_rgb(image):
        return image.cpu()
    raise ValueError(_expected(image))


def _stacked(inputs: list[Tensor]) -> Tensor:
    """Inputs [N, 3, S, S] of inputs [3, S, S]."""
    for one in inputs:
        if not _is_rgb(one):
            raise ValueError(_expected(one))
    if len(sizes := sorted({tuple(one.shape[1:]) for one in inputs})) > 1:
        raise ValueError(
            f"inputs of one forward pass must have one size, got {sizes}; give uint8 pixels, "
            "which are resized, or one size at a time"
        )
    # As the evaluations have them: convolutions then choose the same code, and give the same bits.
    return torch.stack(inputs).contiguous(memory_format=torch.channels_last)


def _is_rgb(image: Tensor) -> bool:
    return image.ndim == 3 and image.shape[0] == 3


def _expected(image: Any) -> str:
    """The error about something that is no image."""
    shape = f" of {image.dtype}, shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
    pillow = "; make a PIL image of an array" if hasattr(image, "__array_interface__") else ""
    return (
        f"got {type(image).__name__}{shape}, expected PIL images, paths of image files, or tensors "
        f"[3, H, W] or [N, 3, H, W] of uint8 (pixels) or float (transformed){pillow}"
    )
