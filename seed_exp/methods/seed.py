"""SEED: students learn the similarities that a frozen teacher sees between an instance and a queue of others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seed_exp.config.schema import ObjectiveConfig
from seed_exp.engine.distributed import all_gather
from seed_exp.methods.losses import seed_loss, seed_target, target_entropy
from seed_exp.methods.queue import Queue
from seed_exp.methods.spread import effective_rank, embedding_std
from seed_exp.methods.teacher_cache import TeacherCache
from seed_exp.models.students import Student
from seed_exp.models.teachers import Teacher
from seed_exp.registry import lookup
from seed_exp.views.recipe import HostBatch


class Objective(NamedTuple):
    """A loss between student and teacher embeddings [N, D] of the same views, with a queue [K, D] of teacher embeddings."""

    target: Callable[[Tensor, Tensor, ObjectiveConfig], Tensor]
    """Of (teacher, queue, config): what of the loss does not depend on the student."""
    loss: Callable[[Tensor, Tensor, Tensor, Tensor, ObjectiveConfig], Tensor]
    """Of (student, teacher, target, queue, config): the scalar that is minimised."""


def _seed_target(teacher: Tensor, queue: Tensor, config: ObjectiveConfig) -> Tensor:
    return seed_target(teacher, queue, tau_teacher=config.tau_teacher)


def _seed_loss(student: Tensor, teacher: Tensor, target: Tensor, queue: Tensor, config: ObjectiveConfig) -> Tensor:
    return seed_loss(student, teacher, queue, tau_student=config.tau_student, tau_teacher=config.tau_teacher, target=target)


OBJECTIVES: dict[str, Objective] = {"seed": Objective(_seed_target, _seed_loss)}


class Targets(NamedTuple):
    """What the whole fleet shares of a batch, per resolution."""

    views: dict[str, Tensor]
    """[V x N, 3, S, S], all images' first view first."""
    teacher: dict[str, Tensor]
    """The teacher's embeddings of these views [V x N, D]."""
    target: dict[str, Tensor]
    """What the objective makes of them and the queue."""


class Seed(nn.Module):
    """One teacher, one queue per resolution, any number of students (arXiv:2101.04731, Section 3.2).

    The queues hold teacher embeddings only, so all students share them.

    Args:
        students: Networks to train, by name.
        teacher: Frozen; its embeddings are as wide as the students'.
        config: Objective, temperatures, queue size.
        resolutions: Names of the views' resolutions; their losses are added up.
        seed: Seed of the queues' initial vectors.
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
        self.trainable: dict[str, nn.Module] = dict(students)
        self.teacher = teacher
        self.cache = cache
        self.queues = {name: Queue(config.queue_size, teacher.embedding_dim, seed) for name in resolutions}
        self.carried: nn.Module = nn.ModuleDict(self.queues)
        self._new: dict[str, list[Tensor]] = {name: [] for name in self.queues}
        self._seen: dict[str, Tensor] = {}

    @torch.no_grad()
    def prepare(self, views: dict[str, Tensor], batch: HostBatch) -> Targets:
        """The teacher's embeddings of views [V, N, 3, S, S]; those of each image's first view are kept for the queue."""
        flat = {name: view.flatten(0, 1) for name, view in views.items()}
        teacher = self._embeddings(views, flat, batch)
        for name, view in views.items():
            self._new[name].append(teacher[name][: view.shape[1]])
        queues = {name: queue.embeddings for name, queue in self.queues.items()}
        target = {name: self.objective.target(teacher[name], queues[name], self.config) for name in flat}
        return Targets(flat, teacher, target)

    def loss(self, name: str, network: nn.Module, targets: Targets) -> dict[str, Tensor]:
        """The student's loss: the sum over resolutions; each one's part; of global views, mean cosine to the teacher and std."""
        out = {}
        for resolution, view in targets.views.items():
            embeddings, teacher, queue = network(view), targets.teacher[resolution], self.queues[resolution].embeddings
            out[f"loss_{resolution}"] = self.objective.loss(embeddings, teacher, targets.target[resolution], queue, self.config)
            if resolution == "global":
                out["teacher_cosine"] = (embeddings.detach() * teacher).sum(1).mean()
                out["embedding_std"] = embedding_std(embeddings)
                self._seen[name] = embeddings.detach()
        parts = [value for key, value in out.items() if key.startswith("loss_")]
        return {"loss": torch.stack(parts).sum(), **out}

    def compile_shared(self) -> None:
        """Compiles the teacher's encoder; its head is nothing beside it."""
        self.teacher.encoder.compile(dynamic=False)

    def rehearsal(self) -> Seed:
        """A copy, to try out a step that leaves no trace: it has no cache."""
        cache, self.cache = self.cache, None
        twin = copy.deepcopy(self)
        self.cache = cache
        return twin

    def diagnostics(self, targets: Targets) -> dict[str, Tensor]:
        """Of global views: the target's entropy in nats and effective neighbours, means; each student's effective rank."""
        queue = self.queues["global"].embeddings
        entropy = target_entropy(targets.teacher["global"], queue, tau_teacher=self.config.tau_teacher)
        ranks = {f"{name}/embedding_rank": effective_rank(embeddings) for name, embeddings in self._seen.items()}
        return {"teacher_entropy": entropy.mean(), "effective_neighbours": entropy.exp().mean(), **ranks}

    def after_step(self) -> None:
        """The teacher's embeddings of the whole global batch replace the oldest in the queues."""
        for name, embeddings in self._new.items():
            self.queues[name].enqueue(all_gather(torch.cat(embeddings)))
            embeddings.clear()
        self._seen.clear()

    def _embeddings(self, views: dict[str, Tensor], flat: dict[str, Tensor], batch: HostBatch) -> dict[str, Tensor]:
        """The teacher's, per resolution [V x N, D]: from the cache if it has all of them."""
        if self.cache is not None and (cached := self.cache.read(batch.epoch, batch.indices)) is not None:
            return {name: cached[name].flatten(0, 1).to(view.device, non_blocking=True) for name, view in flat.items()}
        embeddings = {name: self.teacher(view) for name, view in flat.items()}
        if self.cache is not None:
            by_view = {name: embeddings[name].unflatten(0, view.shape[:2]) for name, view in views.items()}
            self.cache.write(batch.epoch, batch.indices, by_view)
        return embeddings
