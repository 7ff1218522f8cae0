"""SEED: students learn the similarities that a frozen teacher sees between an instance and a queue of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seed_exp.base.registry import lookup
from seed_exp.config.schema import ObjectiveConfig
from seed_exp.engine.distributed import all_gather
from seed_exp.engine.method import Method
from seed_exp.methods.clustering import Clusters, KMeansClusters, OnlineClusters
from seed_exp.methods.collapse import effective_rank, embedding_std
from seed_exp.methods.losses import (
    binary_contrastive_loss,
    bingo_loss,
    bingo_target,
    compress_loss,
    compress_target,
    coss_loss,
    info_nce,
    seed_loss,
    seed_target,
    squared_distance,
    target_entropy,
)
from seed_exp.methods.momentum import MomentumContrast
from seed_exp.methods.queue import Queue
from seed_exp.methods.teacher_cache import TeacherCache
from seed_exp.models.students import Student
from seed_exp.models.teachers import Teacher
from seed_exp.views.recipe import HostBatch


class Objective(NamedTuple):
    """A loss between student and teacher embeddings [N, D] of the same views, with a memory of others [K, D].

    The memory is the queue of the teacher's embeddings or, with `clusters`, the prototypes that are found in it.
    """

    loss: Callable[[Tensor, Tensor, Tensor, Tensor, ObjectiveConfig], Tensor]
    """Of (student, teacher, target, memory, config): the scalar that is minimised."""
    target: Callable[[Tensor, Tensor, ObjectiveConfig], Tensor] = lambda teacher, _memory, _config: (
        teacher
    )
    """Of (teacher, memory, config): what of the loss does not depend on the student [N, D]."""
    clusters: type[Clusters] | None = None
    """What finds the prototypes, and the targets among them."""
    symmetric: bool = False
    """Whether a student's global view is compared with the teacher's embedding of every global view of its image."""
    contrast: bool = False
    """Whether MoCo's loss between the first two global views is added, with each student's own momentum encoder."""

    @property
    def min_global_views(self) -> int:
        """Global views of an image that it compares, at least."""
        return 2 if self.symmetric or self.contrast else 1


SEED = Objective(
    lambda s, t, m, d, config: seed_loss(
        s, t, d, tau_student=config.tau_student, tau_teacher=config.tau_teacher, target=m
    ),
    lambda t, d, config: seed_target(t, d, tau_teacher=config.tau_teacher),
)
DISTANCE = Objective(lambda s, t, _m, _d, _config: squared_distance(s, t))
CLUSTERING = Objective(
    lambda s, _t, m, d, config: compress_loss(s, m, d, temperature=config.tau_student)
)

# s and t: embeddings of student and teacher; d: the memory; m: the target. docs/objectives.md compares them.
OBJECTIVES: dict[str, Objective] = {
    "seed": SEED,
    "seed_strong": SEED._replace(symmetric=True),
    "l2": DISTANCE,
    "k_means": CLUSTERING._replace(clusters=KMeansClusters),
    "online_clustering": CLUSTERING._replace(clusters=OnlineClusters),
    "binary_contrastive": Objective(
        lambda s, t, _m, d, config: binary_contrastive_loss(s, t, d, temperature=config.tau_student)
    ),
    "infonce": Objective(
        lambda s, t, _m, d, config: info_nce(s, t, d, temperature=config.tau_student)
    ),
    "compress": Objective(
        lambda s, _t, m, d, config: compress_loss(s, m, d, temperature=config.tau_student),
        lambda t, d, config: compress_target(t, d, temperature=config.tau_student),
    ),
    "simreg": DISTANCE,
    "disco": Objective(
        lambda s, t, _m, _d, config: config.weight * squared_distance(s, t), contrast=True
    ),
    "bingo": Objective(
        lambda s, t, m, d, config: bingo_loss(s, t, m, d, temperature=config.tau_student),
        lambda t, d, config: bingo_target(t, d, bag_size=config.bag_size, weight=config.weight),
    ),
    "coss": Objective(lambda s, t, _m, _d, config: coss_loss(s, t, weight=config.weight)),
}


class Targets(NamedTuple):
    """What the whole fleet shares of a batch, per resolution."""

    views: dict[str, Tensor]
    """[V x N, 3, S, S], all images' first view first."""
    num_images: int
    """N."""
    teacher: dict[str, Tensor]
    """The teacher's embeddings of these views [V x N, D]."""
    target: dict[str, Tensor]
    """What the objective makes of them and the memory [V x N, D]."""


class Seed(Method):
    """One teacher, one queue per resolution, any number of students (arXiv:2101.04731, Section 3.2).

    The queues hold teacher embeddings only, so all students share them, and prototypes that are found in them. Other objectives
    than SEED's take the same walk.

    Args:
        students: Networks to train, by name.
        teacher: Frozen; its embeddings are as wide as the students'.
        config: Objective and its options.
        resolutions: Names of the views' resolutions; their losses are added up.
        seed: Seed of the initial vectors of queues and prototypes.
        cache: Where the teacher's embeddings are looked for first, and kept.
    """

    def __init__(
        self,
        students: dict[str, Student],
        teacher: Teacher,
        config: ObjectiveConfig,
        resolutions: Iterable[str],
        seed: int,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__()
        self.objective = lookup(OBJECTIVES, config.name, "objective")
        self.config = config
        self.trainable = dict(students)
        self.teacher = teacher
        self.cache = cache
        self.queues = {
            name: Queue(config.queue_size, teacher.embedding_dim, seed) for name in resolutions
        }
        clusters = self.objective.clusters
        self.clusters = (
            {}
            if clusters is None
            else {name: clusters(teacher.embedding_dim, config, seed) for name in self.queues}
        )
        self.contrast = _contrast(students, config, seed) if self.objective.contrast else None
        self.carried = nn.ModuleDict(self.queues)
        if self.clusters:
            self.carried["clusters"] = nn.ModuleDict(self.clusters)
        if self.contrast is not None:
            self.carried["contrast"] = self.contrast
        self._new: dict[str, list[Tensor]] = {name: [] for name in self.queues}
        self._seen: dict[str, Tensor] = {}

    @torch.no_grad()
    def prepare(self, views: dict[str, Tensor], batch: HostBatch) -> Targets:
        """The teacher's embeddings of views [V, N, 3, S, S]; those of each image's first view are kept for the queue."""
        num_images = views["global"].shape[1]
        flat = {name: view.flatten(0, 1) for name, view in views.items()}
        teacher = self._embeddings(views, flat, batch)
        for name in views:
            self._new[name].append(teacher[name][:num_images])
        target = {name: self._target(name, embeddings) for name, embeddings in teacher.items()}
        return Targets(flat, num_images, teacher, target)

    def loss(self, name: str, network: nn.Module, targets: Targets) -> dict[str, Tensor]:
        """The student's loss: the sum over resolutions; each one's part; of global views, mean cosine to the teacher and std."""
        out = {}
        for resolution, view in targets.views.items():
            embeddings = network(view)
            out[f"loss_{resolution}"] = self._compare(resolution, embeddings, targets)
            if resolution == "global":
                out["teacher_cosine"] = (
                    (embeddings.detach() * targets.teacher[resolution]).sum(1).mean()
                )
                out["embedding_std"] = embedding_std(embeddings)
                self._seen[name] = embeddings.detach()
                if self.contrast is not None:
                    queries, images = (
                        embeddings[: targets.num_images],
                        view[targets.num_images : 2 * targets.num_images],
                    )
                    out["loss_contrast"], _ = self.contrast.loss(name, queries, images)
        parts = [value for key, value in out.items() if key.startswith("loss_")]
        return {"loss": torch.stack(parts).sum(), **out}

    def compile_shared(self) -> None:
        """Compiles the teacher's encoder, beside which its head is nothing, and momentum encoders."""
        self.teacher.encoder.compile(dynamic=False)
        if self.contrast is not None:
            self.contrast.compile_encoders()

    def rehearsal(self) -> Method:
        """A copy, to try out a step that leaves no trace: it has no cache."""
        cache, self.cache = self.cache, None
        twin = super().rehearsal()
        self.cache = cache
        return twin

    def diagnostics(self, targets: Targets) -> dict[str, Tensor]:
        """Of global views: the target's entropy in nats and effective neighbours, means; each student's effective rank."""
        queue = self.queues["global"].embeddings
        entropy = target_entropy(
            targets.teacher["global"], queue, tau_teacher=self.config.tau_teacher
        )
        ranks = {
            f"{name}/embedding_rank": effective_rank(embeddings)
            for name, embeddings in self._seen.items()
        }
        return {
            "teacher_entropy": entropy.mean(),
            "effective_neighbours": entropy.exp().mean(),
            **ranks,
        }

    def after_step(self) -> None:
        """The teacher's embeddings of the whole global batch replace the oldest in the queues; what follows these moves on."""
        for name, embeddings in self._new.items():
            self.queues[name].enqueue(all_gather(torch.cat(embeddings)))
            embeddings.clear()
        for name, clusters in self.clusters.items():
            clusters.after_step(self.queues[name].embeddings)
        if self.contrast is not None:
            self.contrast.after_step(self.trainable)
        self._seen.clear()

    def _target(self, resolution: str, teacher: Tensor) -> Tensor:
        if self.clusters:
            return self.clusters[resolution].target(teacher)
        return self.objective.target(teacher, self.queues[resolution].embeddings, self.config)

    def _compare(self, resolution: str, student: Tensor, targets: Targets) -> Tensor:
        """The objective between embeddings and targets of the same views; with `symmetric`, of every pair of global views."""
        memory = (
            self.clusters[resolution].prototypes
            if self.clusters
            else self.queues[resolution].embeddings
        )
        num_views = (
            len(student) // targets.num_images
            if self.objective.symmetric and resolution == "global"
            else 1
        )
        losses = []
        for shift in range(num_views):  # view v of the student with view v - shift of the teacher
            teacher = torch.roll(targets.teacher[resolution], shift * targets.num_images, 0)
            target = torch.roll(targets.target[resolution], shift * targets.num_images, 0)
            losses.append(self.objective.loss(student, teacher, target, memory, self.config))
        return torch.stack(losses).mean()

    def _embeddings(
        self, views: dict[str, Tensor], flat: dict[str, Tensor], batch: HostBatch
    ) -> dict[str, Tensor]:
        """The teacher's, per resolution [V x N, D]: from the cache if it has all of them."""
        if (
            self.cache is not None
            and (cached := self.cache.read(batch.epoch, batch.indices)) is not None
        ):
            return {
                name: cached[name].flatten(0, 1).to(view.device, non_blocking=True)
                for name, view in flat.items()
            }
        embeddings = {name: self.teacher(view) for name, view in flat.items()}
        if self.cache is not None:
            by_view = {
                name: embeddings[name].unflatten(0, view.shape[:2]) for name, view in views.items()
            }
            self.cache.write(batch.epoch, batch.indices, by_view)
        return embeddings


def _contrast(students: dict[str, Student], config: ObjectiveConfig, seed: int) -> MomentumContrast:
    return MomentumContrast(
        students,
        temperature=config.tau_student,
        momentum=config.momentum,
        queue_size=config.queue_size,
        bn_group_size=config.bn_group_size,
        seed=seed,
    )
