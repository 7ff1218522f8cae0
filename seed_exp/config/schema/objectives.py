"""Options of the objectives of `distill`: one dataclass each, with exactly what it reads.

The defaults are the values of conf/objective/NAME.yaml, which says where they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import MISSING

from seed_exp.config.schema.enums import NeighboursPer, QueueInit, TeacherStatistics
from seed_exp.config.schema.networks import StudentConfig
from seed_exp.config.schema.parts import require, require_group_size
from seed_exp.config.schema.queues import WithQueue


@dataclass
class ObjectiveConfig(WithQueue):
    """Options that all objectives share."""

    name: str = MISSING
    """Key of methods.objectives.OBJECTIVES."""
    queue_size: Any = "auto"
    """Teacher embeddings kept, per resolution; auto = 65536, or up to half of fewer images."""
    queue_init: QueueInit = QueueInit.random
    """Queue before the first step: random vectors, or the teacher's embeddings of random images."""
    hidden_dim: int | None = None
    """Hidden width of students' heads that name none; 0 = one linear layer; null = as features."""
    deep_head: bool = False
    """Whether students that do not say it get SimReg's deeper projection head."""

    @property
    def diagnostic_tau(self) -> float:
        """Temperature of the logged teacher_entropy and effective_neighbours.

        The teacher's own, where the objective has one; otherwise SEED's, so that runs compare.
        """
        return 0.01

    @property
    def has_batch_teacher(self) -> bool:
        """Whether the teacher normalises by statistics of the images at hand."""
        return False

    def __post_init__(self) -> None:
        own = type(self).name
        require(
            self.name == own,
            f"objective.name={self.name} does not go with the options of {own}; "
            f"choose the objective with objective={self.name}",
        )
        self.require_queue_size("objective")
        require(
            self.hidden_dim is None or self.hidden_dim >= 0,
            f"objective.hidden_dim must be null, 0 or more, got {self.hidden_dim}",
        )


@dataclass
class DenseConfig(ObjectiveConfig):
    """An objective to which a comparison of feature maps can be added."""

    dense_weight: float = 0.0
    """Factor of the loss between feature maps, position by position; 0 = maps are not compared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_factor(self, "dense_weight")


@dataclass
class SeedConfig(DenseConfig):
    name: str = "seed"
    """Key of methods.objectives.OBJECTIVES."""
    tau_student: float = 0.2
    """Temperature of the student's similarity distribution."""
    tau_teacher: float = 0.01
    """Temperature of the teacher's similarity distribution; towards 0 the loss becomes InfoNCE."""
    effective_neighbours: float | None = None
    """Number that chooses tau_teacher: mean exp(entropy) of the target; null = none does."""
    effective_neighbours_per: NeighboursPer = NeighboursPer.run
    """Reach of a chosen tau_teacher: found once before training, or for each view in each step."""

    @property
    def diagnostic_tau(self) -> float:
        return self.tau_teacher

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tau_student", "tau_teacher")
        neighbours = self.effective_neighbours
        if neighbours is None:
            require(
                self.effective_neighbours_per is NeighboursPer.run,
                "objective.effective_neighbours_per=row needs a number of "
                "objective.effective_neighbours, which is null",
            )
            return
        require(
            1 < neighbours < math.inf,
            "objective.effective_neighbours must be more than 1, which is the image itself, got "
            f"{neighbours:g}",
        )
        require(
            isinstance(self.queue_size, str) or neighbours < self.queue_size + 1,
            f"objective.effective_neighbours={neighbours:g} cannot be reached with the image "
            f"itself and a queue of {self.queue_size}; choose fewer, or a longer queue",
        )
        require(
            self.tau_teacher == type(self).tau_teacher,
            f"objective.tau_teacher={self.tau_teacher:g} and "
            f"objective.effective_neighbours={neighbours:g} both choose the temperature; leave the "
            "first out, or add objective.effective_neighbours=null",
        )


@dataclass
class SeedStrongConfig(SeedConfig):
    name: str = "seed_strong"
    """Key of methods.objectives.OBJECTIVES."""
    hidden_dim: int | None = 2048
    """Hidden width of the projection head of students that name none; null = feature width."""


@dataclass
class SeedGeneralConfig(SeedConfig):
    name: str = "seed_general"
    """Key of methods.objectives.OBJECTIVES."""
    queue_init: QueueInit = QueueInit.teacher
    """Queue before the first step: random vectors, or the teacher's embeddings of random images."""
    hidden_dim: int | None = 0
    """Hidden width of students' heads that name none; 0 = one linear layer; null = as features."""
    tau_student: float = 0.1
    """Temperature of the student's similarity distribution."""
    tau_teacher: float = 0.08
    """Temperature of the teacher's similarity distribution with effective_neighbours=null."""
    effective_neighbours: float | None = 10
    """Number that chooses tau_teacher: mean exp(entropy) of the target; null = none does."""


@dataclass
class PairwiseConfig(DenseConfig):
    """An objective that compares student and teacher without a memory of other images."""

    queue_size: Any = "auto"
    """Teacher embeddings kept for the diagnostics only; auto = 65536, or half of fewer images."""


@dataclass
class L2Config(PairwiseConfig):
    name: str = "l2"
    """Key of methods.objectives.OBJECTIVES."""


@dataclass
class SimRegConfig(PairwiseConfig):
    name: str = "simreg"
    """Key of methods.objectives.OBJECTIVES."""
    deep_head: bool = True
    """Whether students that do not say it get SimReg's deeper projection head."""


@dataclass
class CossConfig(PairwiseConfig):
    name: str = "coss"
    """Key of methods.objectives.OBJECTIVES."""
    weight: float = 1.0
    """Factor of the space similarity; the cosines of the embeddings have 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_factor(self, "weight")


@dataclass
class RegressionConfig(PairwiseConfig):
    name: str = "regression"
    """Key of methods.objectives.OBJECTIVES."""
    smooth_share: float = 0.5
    """Share of smooth-L1 in the loss, from 0 to 1; the cosine has the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_share(self, "smooth_share")


@dataclass
class BatchTeacherConfig(ObjectiveConfig):
    """An objective whose released code leaves the teacher in training mode."""

    teacher_statistics: TeacherStatistics = TeacherStatistics.running
    """Statistics of the teacher's batch norm: of its training, or of bn_group_size images."""
    bn_group_size: int | None = 32
    """Images that the teacher's batch norm takes together; null = a view's in a process."""

    @property
    def has_batch_teacher(self) -> bool:
        return self.teacher_statistics is TeacherStatistics.batch

    def __post_init__(self) -> None:
        super().__post_init__()
        require_group_size("objective", self.bn_group_size)
        require(
            not (self.has_batch_teacher and self.queue_init is QueueInit.teacher),
            "objective.queue_init=teacher takes embeddings of single images, which "
            "objective.teacher_statistics=batch does not have; leave one of them out",
        )


@dataclass
class DiscoConfig(BatchTeacherConfig):
    name: str = "disco"
    """Key of methods.objectives.OBJECTIVES."""
    queue_size: Any = "auto"
    """Each student's keys kept, and the teacher's; auto = 65536, or up to half of fewer images."""
    hidden_dim: int | None = 2048
    """Hidden width of the projection head of students that name none; null = feature width."""
    tau_student: float = 0.2
    """Temperature of the contrast between the student's views."""
    weight: float = 64.0
    """Factor of the distance to the teacher; the contrast has 1."""
    momentum: float = 0.999
    """Share of each student's momentum encoder that a step keeps."""
    bn_group_size: int | None = 32
    """Keys that batch norm takes together, and a batch teacher's images; null = a process's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tau_student")
        _require_factor(self, "weight")
        _require_share(self, "momentum")


@dataclass
class ClusteringConfig(ObjectiveConfig):
    """An objective whose student predicts clusters of the queue."""

    tau_student: float = 0.1
    """Temperature of the student's distribution over the clusters."""
    num_clusters: int = 3000
    """Clusters, per resolution; at most queue_size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tau_student")
        _require_at_least_one(self, "num_clusters")
        require(
            isinstance(self.queue_size, str) or self.num_clusters <= self.queue_size,
            f"objective.num_clusters={self.num_clusters} exceeds "
            f"objective.queue_size={self.queue_size}, in which they are found; "
            "lower the first or raise the second (queue_size=auto takes up to half of the images)",
        )


@dataclass
class KMeansConfig(ClusteringConfig):
    name: str = "k_means"
    """Key of methods.objectives.OBJECTIVES."""
    cluster_every: int = 100
    """Steps between two runs of k-means on the queue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least_one(self, "cluster_every")


@dataclass
class OnlineClusteringConfig(ClusteringConfig):
    name: str = "online_clustering"
    """Key of methods.objectives.OBJECTIVES."""
    queue_size: Any = "auto"
    """Teacher embeddings kept, per resolution; auto = 3840, or up to half of fewer images."""
    published_queue_size: ClassVar[int] = 3840
    """Size that auto stands for with at least as many images."""
    tau_teacher: float = 0.05
    """SwAV's epsilon: temperature of the teacher's assignment to prototypes."""
    momentum: float = 0.99
    """Share of the prototypes that a step keeps."""

    @property
    def diagnostic_tau(self) -> float:
        return self.tau_teacher

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tau_teacher")
        _require_share(self, "momentum")


@dataclass
class BinaryContrastiveConfig(ObjectiveConfig):
    name: str = "binary_contrastive"
    """Key of methods.objectives.OBJECTIVES."""
    queue_size: Any = "auto"
    """Negatives kept, per resolution; auto = 16384, or up to half of fewer images."""
    published_queue_size: ClassVar[int] = 16384
    """Size that auto stands for with at least as many images."""
    tau_student: float = 0.07
    """Temperature of the similarities between student and teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tau_student")


@dataclass
class InfoNCEConfig(ObjectiveConfig):
    name: str = "infonce"
    """Key of methods.objectives.OBJECTIVES."""
    tau_student: float = 0.2
    """Temperature of the student's similarity distribution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tau_student")


@dataclass
class CompressConfig(ObjectiveConfig):
    name: str = "compress"
    """Key of methods.objectives.OBJECTIVES."""
    queue_size: Any = "auto"
    """Teacher embeddings kept, per resolution; auto = 128000, or up to half of fewer images."""
    published_queue_size: ClassVar[int] = 128000
    """Size that auto stands for with at least as many images."""
    tau_student: float = 0.04
    """Temperature of both similarity distributions, the student's and the teacher's."""

    @property
    def diagnostic_tau(self) -> float:
        return self.tau_student

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tau_student")


@dataclass
class BingoConfig(ObjectiveConfig):
    name: str = "bingo"
    """Key of methods.objectives.OBJECTIVES."""
    hidden_dim: int | None = 2048
    """Hidden width of the projection head of students that name none; null = feature width."""
    tau_student: float = 0.2
    """Temperature of the student's similarity distribution."""
    weight: float = 0.5
    """Share of the bag in the loss, from 0 to 1; the image's own embedding has the rest."""
    bag_size: int = 5
    """Nearest neighbours in the queue that are positives."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tau_student")
        _require_share(self, "weight")
        _require_at_least_one(self, "bag_size")


@dataclass
class BingoBagsConfig(BatchTeacherConfig):
    name: str = "bingo_bags"
    """Key of methods.objectives.OBJECTIVES."""
    hidden_dim: int | None = 2048
    """Hidden width of the projection head of students that name none; null = feature width."""
    tau_student: float = 0.2
    """Temperature of the student's similarity distribution."""
    weight: float = 0.5
    """Share of the other image of a pair in the loss, from 0 to 1; the view's own has the rest."""
    bag_size: int = 5
    """Nearest neighbours among all training images, of which each step draws one."""
    own_epochs: int = 11
    """First epochs in which a view that is not mixed has its own image as only positive."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "tau_student")
        _require_share(self, "weight")
        _require_at_least_one(self, "bag_size")
        require(
            self.own_epochs >= 0,
            f"objective.own_epochs must not be negative, got {self.own_epochs}",
        )


OBJECTIVE_CONFIGS: dict[str, type[ObjectiveConfig]] = {
    "seed": SeedConfig,
    "seed_strong": SeedStrongConfig,
    "seed_general": SeedGeneralConfig,
    "l2": L2Config,
    "k_means": KMeansConfig,
    "online_clustering": OnlineClusteringConfig,
    "binary_contrastive": BinaryContrastiveConfig,
    "infonce": InfoNCEConfig,
    "compress": CompressConfig,
    "simreg": SimRegConfig,
    "regression": RegressionConfig,
    "disco": DiscoConfig,
    "bingo": BingoConfig,
    "bingo_bags": BingoBagsConfig,
    "coss": CossConfig,
}
"""Options of each objective in methods.objectives.OBJECTIVES."""


def give_heads(students: dict[str, StudentConfig], objective: ObjectiveConfig) -> None:
    """Gives students that say nothing of their projection head the objective's."""
    for student in students.values():
        if student.hidden_dim is None:
            student.hidden_dim = objective.hidden_dim
        if student.deep_head is None:
            student.deep_head = objective.deep_head
        require(
            not (student.deep_head and student.hidden_dim == 0),
            "hidden_dim=0 is one linear layer, but the head is to be deep; "
            "add objective.deep_head=false, or give another width",
        )


def _require_positive(config: ObjectiveConfig, *options: str) -> None:
    for option in options:
        value = getattr(config, option)
        require(value > 0, f"objective.{option} must be positive, got {value}")


def _require_at_least_one(config: ObjectiveConfig, option: str) -> None:
    value = getattr(config, option)
    require(value >= 1, f"objective.{option} must be at least 1, got {value}")


def _require_share(config: ObjectiveConfig, option: str) -> None:
    value = getattr(config, option)
    require(0 <= value <= 1, f"objective.{option} must be in [0, 1], got {value}")


def _require_factor(config: ObjectiveConfig, option: str) -> None:
    value = getattr(config, option)
    require(
        0 <= value < math.inf,
        f"objective.{option} must be a finite factor of at least 0, got {value}",
    )
