"""The dense term: feature maps of student and teacher are compared position by position.

Both see the same view, so a position of one map shows the same part of the image as the same
position of the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.config.schema import DenseConfig, DistillConfig, ObjectiveConfig, ViewsConfig
from seed_exp.methods.losses import regression_loss
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.maps import WITHOUT, map_of_empty_image
from seed_exp.models.students import Student

SMOOTH_SHARE = 0.1
"""Share of smooth-L1 in the loss of a position, as in EUPE (arXiv:2603.22387)."""


def dense_weight(config: ObjectiveConfig) -> float:
    """Factor of the dense term; 0 = there is none."""
    return config.dense_weight if isinstance(config, DenseConfig) else 0.0


def dense_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """0.9 (1 - cosine) + 0.1 smooth-L1 between the vectors at a position, mean over positions.

    The patch loss of EUPE, arXiv:2603.22387. The map with the smaller grid is first resized to the
    other's, bilinearly.

    Args:
        student: Maps [N, C, h, w] that the student predicts; the gradient flows here.
        teacher: Standardised maps of the same views [N, C, H, W]; constant.

    Returns:
        Scalar, not negative, float32 also under autocast.

    Raises:
        ValueError: the maps are not of as many views, or not as wide.
    """
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "maps must be [N, C, h, w] of the same views and width, got "
            f"student {list(student.shape)}, teacher {list(teacher.shape)}"
        )
    with torch.autocast(student.device.type, enabled=False):
        grid = [max(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        rows = [
            _resized(maps.float(), grid).permute(0, 2, 3, 1).flatten(0, 2)
            for maps in (student, teacher.detach())
        ]
        return regression_loss(*rows, smooth_share=SMOOTH_SHARE)


def _resized(maps: Tensor, grid: list[int]) -> Tensor:
    if list(maps.shape[2:]) == grid:
        return maps
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)


class DenseTerm(nn.Module):
    """Weight of the dense term, and the fixed mean and scale of the teacher's maps.

    Args:
        weight: Factor of the loss.
        width: Channels C of the teacher's maps.
    """

    mean: Tensor
    """Mean of each channel [C]; 0 until it is fitted."""
    factor: Tensor
    """1 / standard deviation of each channel [C]; 0 for one that is constant."""

    def __init__(self, weight: float, width: int) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("factor", torch.ones(width))

    def targets(self, maps: Tensor) -> Tensor:
        """The teacher's maps [N, C, h, w], standardised; float32 also under autocast."""
        with torch.autocast(maps.device.type, enabled=False):
            return (maps.float() - self.mean[:, None, None]) * self.factor[:, None, None]

    def loss(self, student: Tensor, targets: Tensor) -> Tensor:
        """`dense_loss` times the weight."""
        return self.weight * dense_loss(student, targets)


def dense_term(
    config: ObjectiveConfig,
    students: Mapping[str, Student],
    teacher: Teacher,
    views: ViewsConfig,
    seed: int,
    *,
    is_whole: bool = True,
) -> DenseTerm | None:
    """The dense term that `config` asks for, if it does; every student then gets a map head.

    Args:
        config: The objective.
        students: By name.
        teacher: Adapted to the views.
        views: The recipe.
        seed: Seed of the heads' weights.
        is_whole: Whether the recipe has the largest views of the run, which need several positions.

    Raises:
        ValueError: a network has no maps of the views, only a single position of the largest, or
            its grid cannot be aligned with the teacher's.
    """
    weight = dense_weight(config)
    if weight == 0:
        return None
    sizes = views.sizes
    theirs = {size: teacher.map_shape(size) for size in sizes}
    if is_whole:
        _refuse_single_position("the teacher", sizes[-1], theirs[sizes[-1]])
    width = theirs[sizes[-1]][0]
    for name, student in students.items():
        whose = f"students.{name}"
        for size in sizes:
            shape = map_of_empty_image(student.encoder, size, whose)
            _refuse_other_ratio(whose, size, shape, theirs[size])
        if is_whole:
            _refuse_single_position(whose, sizes[-1], shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student.add_map_head(shape[0], width)
    return DenseTerm(weight, width)


def refuse_dense_cache(config: DistillConfig, teacher: Teacher, num_images: int) -> None:
    """Checks that no teacher cache is to hold maps.

    Args:
        config: All options.
        teacher: Adapted to the views; it may be untrained.
        num_images: Training images.

    Raises:
        ValueError: one is; the message has the bytes that it would need.
    """
    if config.teacher_cache is None or dense_weight(config.objective) == 0:
        return
    numbers = 0
    for crop in config.views.largest().crops.values():
        if crop.num > 0:
            channels, height, width = teacher.map_shape(crop.size)
            numbers += crop.num * channels * height * width
    of_epoch = 2 * numbers * num_images
    raise ValueError(
        f"teacher_cache={config.teacher_cache} holds embeddings, not maps, which would need "
        f"{of_epoch / 1e9:,.3g} GB in float16 for each epoch ({num_images:,} images of "
        f"{numbers:,} numbers); leave teacher_cache out, or {WITHOUT}"
    )


def _refuse_single_position(whose: str, size: int, shape: tuple[int, int, int]) -> None:
    if shape[1:] == (1, 1):
        raise ValueError(
            f"{whose} has a map of a single position of views of {size} x {size} pixels, which "
            f"shows nothing that the pooled features do not; choose larger views, or {WITHOUT}"
        )


def _refuse_other_ratio(
    whose: str, size: int, own: tuple[int, int, int], theirs: tuple[int, int, int]
) -> None:
    if own[1] * theirs[2] != own[2] * theirs[1]:
        raise ValueError(
            f"the grid of {whose} ({own[1]} x {own[2]}) cannot be aligned with the teacher's "
            f"({theirs[1]} x {theirs[2]}) of views of {size} x {size} pixels: their "
            f"sides have other proportions; {WITHOUT}"
        )
