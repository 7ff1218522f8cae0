"""Losses between a student and the teacher, by objective; docs/objectives.md compares them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from seed_exp.base.registry import Registry
from seed_exp.config.schema import (
    BinaryContrastiveConfig,
    BingoBagsConfig,
    BingoConfig,
    ClusteringConfig,
    CompressConfig,
    CossConfig,
    DiscoConfig,
    InfoNCEConfig,
    ObjectiveConfig,
    RegressionConfig,
    SeedConfig,
)
from seed_exp.methods.clustering import Clusters, KMeansClusters, OnlineClusters
from seed_exp.methods.losses import (
    bag_loss,
    binary_contrastive_loss,
    bingo_loss,
    bingo_target,
    compress_loss,
    compress_target,
    coss_loss,
    info_nce,
    regression_loss,
    seed_loss,
    seed_target,
    squared_distance,
)
from seed_exp.methods.momentum import MomentumContrast
from seed_exp.methods.temperature import teacher_temperature
from seed_exp.models.students import Student

Options = TypeVar("Options", bound=ObjectiveConfig)


@dataclass(frozen=True)
class Objective(Generic[Options]):
    """A loss between student and teacher embeddings [N, D] of the same views, with a memory [K, D].

    The memory is the queue of the teacher's embeddings or, with `clusters`, the prototypes that are
    found in it.
    """

    loss: Callable[[Tensor, Tensor, Tensor, Tensor, Options], Tensor]
    """(student, teacher, target, memory, config) -> the scalar that is minimised."""
    target: Callable[[Tensor, Tensor, Options], Tensor] = lambda teacher, _memory, _config: teacher
    """(teacher, memory, config) -> the part of the loss that no student changes [N, D]."""
    clusters: Callable[[int, Options, int], Clusters] | None = None
    """(embedding width, config, seed) -> the prototypes, and the targets among them."""
    contrast: Callable[[Mapping[str, Student], Options, int], MomentumContrast] | None = None
    """(students, config, seed) -> MoCo's loss between the first two global views, added."""
    pairs: bool = False
    """Whether each image comes with one of its bag, whose embedding is the target."""
    symmetric: bool = False
    """Whether a student's global view meets the teacher's embedding of each global view."""
    unit_length: bool = True
    """Whether embeddings are compared at unit length; else the student and the target have their
    own."""

    @property
    def min_global_views(self) -> int:
        """Smallest number of global views per image that the loss can compare."""
        return 2 if self.symmetric or self.pairs or self.contrast is not None else 1


def _own_contrast(
    students: Mapping[str, Student], config: DiscoConfig, seed: int
) -> MomentumContrast:
    return MomentumContrast(
        students,
        temperature=config.tau_student,
        momentum=config.momentum,
        queue_size=config.queue_length,
        bn_group_size=config.bn_group_size,
        seed=seed,
    )


# s and t: embeddings of student and teacher; d: the memory; m: the target.
SEED = Objective[SeedConfig](
    lambda s, t, m, d, config: seed_loss(
        s, t, d, tau_student=config.tau_student, tau_teacher=config.tau_teacher, target=m
    ),
    lambda t, d, config: seed_target(t, d, tau_teacher=teacher_temperature(t, d, config)),
)
DISTANCE = Objective[ObjectiveConfig](lambda s, t, _m, _d, _config: squared_distance(s, t))


def _predict_clusters(
    student: Tensor, _teacher: Tensor, target: Tensor, memory: Tensor, config: ClusteringConfig
) -> Tensor:
    return compress_loss(student, target, memory, temperature=config.tau_student)


_OBJECTIVES: dict[str, Objective[Any]] = {
    "seed": SEED,
    "seed_strong": replace(SEED, symmetric=True),
    "seed_general": SEED,
    "l2": DISTANCE,
    "k_means": Objective(_predict_clusters, clusters=KMeansClusters),
    "online_clustering": Objective(_predict_clusters, clusters=OnlineClusters),
    "binary_contrastive": Objective[BinaryContrastiveConfig](
        lambda s, t, _m, d, config: binary_contrastive_loss(s, t, d, temperature=config.tau_student)
    ),
    "infonce": Objective[InfoNCEConfig](
        lambda s, t, _m, d, config: info_nce(s, t, d, temperature=config.tau_student)
    ),
    "compress": Objective[CompressConfig](
        lambda s, _t, m, d, config: compress_loss(s, m, d, temperature=config.tau_student),
        lambda t, d, config: compress_target(t, d, temperature=config.tau_student),
    ),
    "simreg": DISTANCE,
    "regression": Objective[RegressionConfig](
        lambda s, _t, m, _d, config: regression_loss(s, m, smooth_share=config.smooth_share),
        unit_length=False,
    ),
    "disco": Objective[DiscoConfig](
        lambda s, t, _m, _d, config: config.weight * squared_distance(s, t), contrast=_own_contrast
    ),
    "bingo": Objective[BingoConfig](
        lambda s, t, m, d, config: bingo_loss(s, t, m, d, temperature=config.tau_student),
        lambda t, d, config: bingo_target(t, d, bag_size=config.bag_size, weight=config.weight),
    ),
    "bingo_bags": Objective[BingoBagsConfig](
        lambda s, t, m, d, config: bag_loss(
            s, t, m, d, own_share=1 - config.weight, temperature=config.tau_student
        ),
        pairs=True,
    ),
    "coss": Objective[CossConfig](
        lambda s, t, _m, _d, config: coss_loss(s, t, weight=config.weight)
    ),
}
OBJECTIVES: Registry[Objective[Any]] = Registry("OBJECTIVES", _OBJECTIVES)
