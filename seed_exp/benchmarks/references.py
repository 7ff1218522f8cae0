"""The plain way to do the suite's work, as one writes it with Pillow, torchvision and PyTorch.

The benches compare the suite with it, and with kornia and DALI.
"""

from __future__ import annotations

import base64
import copy
import io
import random
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F
from torch.utils.dlpack import from_dlpack
from torchvision import transforms

from seed_exp.config.schema import CropConfig, OptimizerConfig, SeedConfig, ViewsConfig
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.students import Student


class PlainTsv:
    """The first `num` images of a TSV file, read with line offsets, base64 and Pillow."""

    def __init__(self, path: Path, num: int) -> None:
        self.file = path.open("rb")
        lengths = [len(line) for line in islice(self.file, num)]
        self.offsets = [sum(lengths[:row]) for row in range(len(lengths))]

    def data(self, index: int) -> bytes:
        """Returns the encoded image file `index`."""
        self.file.seek(self.offsets[index])
        return base64.b64decode(self.file.readline().split(b"\t")[2])

    def image(self, index: int) -> Image.Image:
        """Returns the decoded image `index`."""
        return Image.open(io.BytesIO(self.data(index))).convert("RGB")


class Blur:
    """Pillow's Gaussian blur with a sigma drawn for each image, as in MoCo-V2's released code."""

    def __init__(self, sigma: Sequence[float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns the blurred image."""
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def plain_transform(crop: CropConfig, config: ViewsConfig) -> transforms.Compose:
    """Returns the transform from a Pillow image to one normalised view, float32 [3, S, S]."""
    jitter = transforms.RandomApply([transforms.ColorJitter(*config.jitter)], config.jitter_prob)
    grayscale = transforms.RandomGrayscale(config.grayscale_prob)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(crop.size, crop.scale, config.aspect_ratio),
            *([grayscale, jitter] if config.grayscale_first else [jitter, grayscale]),
            transforms.RandomApply([Blur(config.blur_sigma)], config.blur_prob),
            transforms.RandomHorizontalFlip(config.flip_prob),
            transforms.ToTensor(),
            transforms.Normalize(config.mean, config.std),
        ]
    )


class PlainViews:
    """The views of a recipe, made one after the other."""

    def __init__(self, config: ViewsConfig) -> None:
        crops = {name: crop for name, crop in config.crops.items() if crop.num > 0}
        self.transforms = {
            name: [plain_transform(crop, config)] * crop.num for name, crop in crops.items()
        }

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Returns the views of the images, float32 [V, N, 3, S, S] per resolution."""
        made = {
            name: [[view(image) for image in images] for view in views]
            for name, views in self.transforms.items()
        }
        return {
            name: torch.stack([torch.stack(row) for row in rows]) for name, rows in made.items()
        }


def plain_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, *, tau_student: float, tau_teacher: float
) -> Tensor:
    """SEED's loss from the N x (K+1) matrix of logits, own embedding first.

    Arguments and result are those of `methods.losses.seed_loss`.
    """
    queue = queue.clone()  # enqueuing changes the queue before the backward pass
    logits = (
        torch.cat([(student * teacher).sum(1, keepdim=True), student @ queue.T], dim=1)
        / tau_student
    )
    target_logits = (
        torch.cat([(teacher * teacher).sum(1, keepdim=True), teacher @ queue.T], dim=1)
        / tau_teacher
    )
    return -(target_logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


class PlainTraining:
    """One student's training in the plain way.

    Tensors are contiguous and nothing is compiled. The precision is float32 on a CPU, and float16
    with a gradient scaler on a GPU.

    Args:
        student: Student of which a copy is trained.
        teacher: Teacher of which a copy gives the targets.
        objective: Temperatures and queue size.
        optimizer: Learning rate, momentum and weight decay of SGD.
        resolutions: Names of the views' resolutions, each with a queue of its own.
        device: Device to train on.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        objective: SeedConfig,
        optimizer: OptimizerConfig,
        resolutions: Sequence[str],
        device: torch.device,
    ) -> None:
        self.student = copy.deepcopy(student).to(device).train()
        self.teacher = copy.deepcopy(teacher).to(device)
        self.objective = objective
        dim = teacher.embedding_dim
        self.queues = {
            name: F.normalize(torch.randn(objective.queue_length, dim, device=device), dim=1)
            for name in resolutions
        }
        self.position = 0
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            optimizer.lr,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.device = device

    def step(self, views: dict[str, Tensor]) -> None:
        """Makes one optimiser step on finished views, float32 [V, N, 3, S, S] per resolution."""
        loss, keys = torch.zeros((), device=self.device), {}
        for name, view in views.items():
            images = view.to(self.device, non_blocking=True).flatten(0, 1)
            with torch.autocast(
                self.device.type, torch.float16, enabled=self.device.type == "cuda"
            ):
                with torch.no_grad():
                    teacher = self.teacher.embed(images)
                student = F.normalize(self.student.head(self.student.encoder(images)), dim=1)
                temperatures = {
                    "tau_student": self.objective.tau_student,
                    "tau_teacher": self.objective.tau_teacher,
                }
                loss = loss + plain_loss(student, teacher, self.queues[name], **temperatures)
            keys[name] = teacher[: view.shape[1]].float()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, key in keys.items():
            rows = torch.arange(self.position, self.position + len(key), device=self.device) % len(
                self.queues[name]
            )
            self.queues[name][rows] = key
        num = len(next(iter(keys.values())))
        self.position = (self.position + num) % self.objective.queue_length


def kornia_views(config: ViewsConfig) -> Callable[[Tensor], Tensor] | None:
    """Returns kornia's version of the device half of the views; None if kornia is not installed.

    It maps uint8 [M, 3, S, S] to float32 of the same shape.
    """
    try:
        from kornia import augmentation  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return None
    size = 2 * int(3 * config.blur_sigma[1]) + 1
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    augment = augmentation.AugmentationSequential(
        augmentation.ColorJitter(*config.jitter, p=config.jitter_prob),
        augmentation.RandomGrayscale(p=config.grayscale_prob),
        augmentation.RandomGaussianBlur(
            (size, size), (config.blur_sigma[0], config.blur_sigma[1]), p=config.blur_prob
        ),
        augmentation.RandomHorizontalFlip(p=config.flip_prob),
        augmentation.Normalize(mean, std),
        data_keys=["input"],
    )
    return lambda images: augment(images.float() / 255)


def dali_views(
    config: ViewsConfig, num: int
) -> Callable[[Sequence[bytes]], dict[str, Tensor]] | None:
    """Returns DALI's version of both halves of the views; None if DALI is not installed.

    It maps `num` encoded image files to views, float32 [V, N, 3, S, S] per resolution, with CPU
    operators in one thread. Unlike in the recipe, the order of the jitter's steps is not random.
    """
    try:
        from nvidia.dali import fn, pipeline_def, types  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return None
    crops = {name: crop for name, crop in config.crops.items() if crop.num > 0}

    def chance(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    def between(low: float, high: float) -> Any:
        return fn.random.uniform(range=[low, high]) if low < high else low

    def jitter(view: Any) -> Any:
        *changes, hue = config.jitter
        brightness, contrast, saturation = (
            between(max(0.0, 1 - change), 1 + change) for change in changes
        )
        turned = between(-360 * hue, 360 * hue)
        return fn.color_twist(
            view, brightness=brightness, contrast=contrast, saturation=saturation, hue=turned
        )

    def view_of(image: Any, crop: CropConfig) -> Any:
        options = {
            "random_area": crop.scale,
            "random_aspect_ratio": config.aspect_ratio,
            "antialias": True,
        }
        view = fn.random_resized_crop(image, size=crop.size, **options)
        if chance(config.jitter_prob):
            view = jitter(view)
        if chance(config.grayscale_prob):
            view = fn.saturation(view, saturation=0.0)
        if chance(config.blur_prob):
            view = fn.gaussian_blur(view, sigma=between(*config.blur_sigma))
        scaled = {
            "mean": [255 * mean for mean in config.mean],
            "std": [255 * std for std in config.std],
        }
        mirror = fn.random.coin_flip(probability=config.flip_prob)
        return fn.crop_mirror_normalize(
            view, mirror=mirror, dtype=types.FLOAT, output_layout="CHW", **scaled
        )

    alone = {"num_threads": 1, "device_id": None, "prefetch_queue_depth": 1}

    @pipeline_def(batch_size=num, enable_conditionals=True, **alone)  # type: ignore[untyped-decorator,unused-ignore]
    def pipeline() -> Any:
        image = fn.decoders.image(
            fn.external_source(name="files", dtype=types.UINT8), output_type=types.RGB
        )
        return tuple(view_of(image, crop) for crop in crops.values() for _ in range(crop.num))

    pipe = pipeline()
    pipe.build()

    def run(files: Sequence[bytes]) -> dict[str, Tensor]:
        made = pipe.run(files=[np.frombuffer(file, np.uint8) for file in files])
        views = iter([from_dlpack(view.as_tensor()) for view in made])
        return {name: torch.stack(list(islice(views, crop.num))) for name, crop in crops.items()}

    return run
