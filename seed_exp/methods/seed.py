"""SEED: students learn the similarities that a frozen teacher sees between an instance and a queue of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from seed_exp.config.schema import ObjectiveConfig
from seed_exp.engine.distributed import all_gather
from seed_exp.methods.losses import seed_loss, target_entropy
from seed_exp.methods.queue import Queue
from seed_exp.models.students import Student
from seed_exp.models.teachers import Teacher
from seed_exp.registry import lookup


class Objective(Protocol):
    """A loss between student and teacher embeddings [N, D] of the same views, with a queue [K, D] of teacher embeddings."""

    def __call__(self, student: Tensor, teacher: Tensor, queue: Tensor, *, tau_student: float, tau_teacher: float) -> Tensor: ...


OBJECTIVES: dict[str, Objective] = {"seed": seed_loss}


class Targets(NamedTuple):
    """What the whole fleet shares of a batch."""

    views: dict[str, Tensor]
    """Per resolution: [V x N, 3, S, S], all images' first view first."""
    teacher: dict[str, Tensor]
    """Per resolution: the teacher's embeddings of these views [V x N, D]."""


class Seed(nn.Module):
    """One teacher, one queue per resolution, any number of students (arXiv:2101.04731, Section 3.2).

    The queues hold teacher embeddings only, so all students share them.

    Args:
        students: Networks to train, by name.
        teacher: Frozen; its embeddings are as wide as the students'.
        config: Objective, temperatures, queue size.
        resolutions: Names of the views' resolutions; their losses are added up.
        seed: Seed of the queues' initial vectors.
    """

    def __init__(
        self,
        students: dict[str, Student],
        teacher: Teacher,
        config: ObjectiveConfig,
        resolutions: Iterable[str],
        seed: int,
    ) -> None:
        super().__init__()
        self.objective = lookup(OBJECTIVES, config.name, "objective")
        self.config = config
        self.trainable: dict[str, nn.Module] = dict(students)
        self.teacher = teacher
        self.queues = {name: Queue(config.queue_size, teacher.embedding_dim, seed) for name in resolutions}
        self.carried: nn.Module = nn.ModuleDict(self.queues)
        self._new: dict[str, list[Tensor]] = {name: [] for name in self.queues}

    @torch.no_grad()
    def prepare(self, views: dict[str, Tensor], labels: Tensor) -> Targets:  # noqa: ARG002
        """The teacher's embeddings of views [V, N, 3, S, S]; those of each image's first view are kept for the queue."""
        flat = {name: view.flatten(0, 1) for name, view in views.items()}
        embeddings = {name: self.teacher(view) for name, view in flat.items()}
        for name, view in views.items():
            self._new[name].append(embeddings[name][: view.shape[1]])
        return Targets(flat, embeddings)

    def loss(self, name: str, network: nn.Module, targets: Targets) -> dict[str, Tensor]:  # noqa: ARG002
        """The student's loss: the sum over resolutions; each one's part; mean cosine to the teacher in global views."""
        out = {}
        for resolution, view in targets.views.items():
            embeddings, target = network(view), targets.teacher[resolution]
            out[f"loss_{resolution}"] = self.objective(
                embeddings,
                target,
                self.queues[resolution].embeddings,
                tau_student=self.config.tau_student,
                tau_teacher=self.config.tau_teacher,
            )
            if resolution == "global":
                out["teacher_cosine"] = (embeddings.detach() * target).sum(1).mean()
        parts = [value for key, value in out.items() if key.startswith("loss_")]
        return {"loss": torch.stack(parts).sum(), **out}

    def diagnostics(self, targets: Targets) -> dict[str, Tensor]:
        """Of the teacher's target in global views: mean entropy in nats, and mean effective number of neighbours."""
        queue = self.queues["global"].embeddings
        entropy = target_entropy(targets.teacher["global"], queue, tau_teacher=self.config.tau_teacher)
        return {"teacher_entropy": entropy.mean(), "effective_neighbours": entropy.exp().mean()}

    def after_step(self) -> None:
        """The teacher's embeddings of the whole global batch replace the oldest in the queues."""
        for name, embeddings in self._new.items():
            self.queues[name].enqueue(all_gather(torch.cat(embeddings)))
            embeddings.clear()
