"""SEED: students learn a frozen teacher's similarities of an instance to a queue of others."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.base.network_names import TEACHER
from seed_exp.base.registry import lookup
from seed_exp.config.schema import (
    BatchTeacherConfig,
    ObjectiveConfig,
    Precision,
    QueueInit,
    SeedConfig,
)
from seed_exp.engine.distributed import all_gather
from seed_exp.engine.method import Method
from seed_exp.methods.collapse import effective_rank, embedding_std
from seed_exp.methods.dense import DenseTerm
from seed_exp.methods.grouped import number_of_groups
from seed_exp.methods.losses import target_entropy
from seed_exp.methods.objectives import OBJECTIVES
from seed_exp.methods.queue import Queue
from seed_exp.methods.teacher_cache import TeacherCache
from seed_exp.methods.temperature import Temperature, neighbours_of, teacher_temperature
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.students import Student
from seed_exp.models.teacher_precision import torch_format
from seed_exp.views.recipe import HostBatch

ONE_HOT = 1.01
"""Effective neighbours below which the target is one-hot, the image itself."""
NUM_ONE_HOT = 5
"""Log lines in a row with such targets after which the user is told; 1 for general encoders."""
SUGGESTED_NEIGHBOURS = 10
"""Effective neighbours that the user is told to try; the image itself is one of them."""


class Targets(NamedTuple):
    """Part of a batch that the whole fleet shares, by resolution."""

    views: dict[str, Tensor]
    """[V x N, 3, S, S], all images' first view first."""
    num_images: int
    """N, images of the batch."""
    teacher: dict[str, Tensor]
    """The teacher's embeddings of these views [V x N, D], unit length."""
    target: dict[str, Tensor]
    """The objective's targets from these embeddings and the memory [V x N, D]."""
    maps: dict[str, Tensor]
    """The teacher's standardised maps of these views [V x N, C, h, w]; empty without a dense term.
    """


class Seed(Method):
    """One teacher, one queue per resolution, any number of students (arXiv:2101.04731, Sec. 3.2).

    The queues hold teacher embeddings only. So all students share them and the prototypes found in
    them. Every objective takes the same walk.

    Args:
        students: Networks to train, by name.
        teacher: Frozen; its embeddings are as wide as the students'.
        config: Objective and its options.
        resolutions: Names of the views' resolutions; their losses are added up.
        seed: Seed of the initial vectors of queues and prototypes.
        cache: Where the teacher's embeddings are looked for first, and kept.
        dense: Comparison of maps, for which each student has a map head; not with a cache.
    """

    def __init__(
        self,
        students: dict[str, Student],
        teacher: Teacher,
        config: ObjectiveConfig,
        resolutions: Iterable[str],
        seed: int,
        cache: TeacherCache | None = None,
        dense: DenseTerm | None = None,
    ) -> None:
        super().__init__()
        self.objective = lookup(OBJECTIVES, config.name, "objective")
        self.config = config
        self.trainable = dict(students)
        self.teacher = teacher
        if config.has_batch_teacher:
            teacher.normalise_by_batch()
        assert cache is None or dense is None
        self.cache, self.dense = cache, dense
        self.queues = {
            name: Queue(config.queue_length, teacher.embedding_dim, seed) for name in resolutions
        }
        clusters = self.objective.clusters
        self.clusters = (
            {}
            if clusters is None
            else {name: clusters(teacher.embedding_dim, config, seed) for name in self.queues}
        )
        contrast = self.objective.contrast
        self.contrast = None if contrast is None else contrast(students, config, seed)
        self.carried = nn.ModuleDict(self.queues)
        self.temperature: Temperature | None = None
        if neighbours_of(config) is not None:
            self.temperature = self.carried["temperature"] = Temperature()
        if self.clusters:
            self.carried["clusters"] = nn.ModuleDict(self.clusters)
        if self.contrast is not None:
            self.carried["contrast"] = self.contrast
        if dense is not None:
            self.carried["dense"] = dense
        self._new: dict[str, list[Tensor]] = {name: [] for name in self.queues}
        self._seen: dict[str, Tensor] = {}
        self._num_one_hot = 0

    def found(self) -> dict[str, float]:
        """The calibrated temperature, if there is one."""
        value = None if self.temperature is None else self.temperature.value
        return {} if value is None else {"tau_teacher": value}

    def options(self) -> ObjectiveConfig:
        """The objective's options, with the temperature that was found if one was asked for."""
        if self.temperature is None or self.temperature.value is None:
            return self.config
        found = copy.copy(self.config)
        assert isinstance(found, SeedConfig)
        found.tau_teacher = self.temperature.value
        return found

    @torch.no_grad()
    def prepare(self, views: dict[str, Tensor], batch: HostBatch) -> Targets:
        """Teacher embeddings and targets of views [V, N, 3, S, S].

        Keeps the embeddings of each image's first view for the queue.
        """
        num_images = views["global"].shape[1]
        flat = {name: view.flatten(0, 1) for name, view in views.items()}
        maps: dict[str, Tensor] = {}
        if self.dense is None:
            embeddings = self._embeddings(views, flat, batch)
        else:
            both = {name: self.teacher.with_maps(view) for name, view in flat.items()}
            embeddings = {name: rows for name, (rows, _) in both.items()}
            maps = {name: self.dense.targets(found) for name, (_, found) in both.items()}
        teacher = {name: self.teacher.at_unit_length(rows) for name, rows in embeddings.items()}
        for name in views:
            self._new[name].append(teacher[name][:num_images])
        target = {name: self._target(name, rows) for name, rows in embeddings.items()}
        return Targets(flat, num_images, teacher, target, maps)

    def loss(self, name: str, network: nn.Module, targets: Targets) -> dict[str, Tensor]:
        """The student's loss and its parts, one for each resolution; the loss is their sum.

        With a dense term one more for each resolution. For global views also the mean cosine to the
        teacher and the std of the embeddings.
        """
        out = {}
        unit_length = self.objective.unit_length
        for resolution, view in targets.views.items():
            if self.dense is None:
                embeddings = network(view, unit_length=unit_length)
            else:
                embeddings, maps = network(view, unit_length=unit_length, with_map=True)
            out[f"loss_{resolution}"] = self._compare(resolution, embeddings, targets)
            if self.dense is not None:
                out[f"loss_dense_{resolution}"] = self.dense.loss(maps, targets.maps[resolution])
            if not unit_length:
                embeddings = F.normalize(embeddings, dim=1)
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
        """Compiles the teacher's encoder (its head costs next to nothing) and momentum encoders."""
        self.teacher.compile_encoder(with_maps=self.dense is not None)
        if self.contrast is not None:
            self.contrast.compile_encoders()

    def compute_in(self, formats: Mapping[str, Precision]) -> None:
        """Gives networks formats of their own, the teacher and momentum encoders included."""
        super().compute_in(formats)
        if TEACHER in formats:
            self.teacher.format = torch_format(formats[TEACHER])
        if self.contrast is not None:
            self.contrast.compute_in(formats)

    def rehearsal(self) -> Method:
        """A copy without a cache, so that trying out a step leaves no trace."""
        cache, self.cache = self.cache, None
        twin = super().rehearsal()
        self.cache = cache
        return twin

    def diagnostics(self, targets: Targets) -> dict[str, Tensor]:
        """Mean entropy of the target (nats), effective neighbours, each student's effective rank.

        All of them for global views. The teacher's temperature too, where it is calibrated.
        """
        config, queue = self.options(), self.queues["global"].embeddings
        teacher = targets.teacher["global"]
        tau: float | Tensor = config.diagnostic_tau
        chosen: dict[str, Tensor] = {}
        if isinstance(config, SeedConfig) and self.temperature is not None:
            tau = teacher_temperature(teacher, queue, config)
            chosen["tau_teacher"] = (queue.new_ones(()) * tau).mean()
        entropy = target_entropy(teacher, queue, tau_teacher=tau)
        ranks = {
            f"{name}/embedding_rank": effective_rank(embeddings)
            for name, embeddings in self._seen.items()
        }
        return {
            "teacher_entropy": entropy.mean(),
            "effective_neighbours": entropy.exp().mean(),
            **chosen,
            **ranks,
        }

    def advice(self, shown: Mapping[str, float], *, num_seen: int, num_images: int) -> str | None:
        """Says once that the target has no neighbours, when the queue has had its chance.

        It has when no random vectors are left in it, or every image has been in it. A calibrated
        temperature gives the target its neighbours. A teacher without a head is a general encoder,
        to which the paper's temperature does not fit: its first log line is enough.
        """
        config = self.config
        is_random = config.queue_init is QueueInit.random
        if not isinstance(config, SeedConfig) or self.temperature is not None:
            return None
        if is_random and num_seen < min(config.queue_length, num_images):
            return None
        enough = 1 if isinstance(self.teacher.head, nn.Identity) else NUM_ONE_HOT
        if self._num_one_hot < enough:
            is_one_hot = shown.get("effective_neighbours", math.inf) < ONE_HOT
            self._num_one_hot = self._num_one_hot + 1 if is_one_hot else 0
            if self._num_one_hot == enough:
                return (
                    f"the target is one-hot (effective_neighbours below {ONE_HOT} in "
                    f"{enough} log lines): at objective.tau_teacher={config.tau_teacher:g} "
                    "no image of the queue resembles another, and the students learn no "
                    "similarities, only to tell images apart (InfoNCE). "
                    "objective.effective_neighbours=K chooses a higher one, at which the target "
                    f"has K neighbours, e.g. K={SUGGESTED_NEIGHBOURS}"
                )
        return None

    def after_step(self) -> None:
        """Replaces the oldest embeddings in the queues by the teacher's of the whole global batch.

        Prototypes and momentum encoders then move on.
        """
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
        return self.objective.target(teacher, self.queues[resolution].embeddings, self.options())

    def _compare(self, resolution: str, student: Tensor, targets: Targets) -> Tensor:
        """The loss between embeddings and targets of the same views.

        With `symmetric`, the mean over every pair of global views.
        """
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
            losses.append(self.objective.loss(student, teacher, target, memory, self.options()))
        return torch.stack(losses).mean()

    def _embeddings(
        self, views: dict[str, Tensor], flat: dict[str, Tensor], batch: HostBatch
    ) -> dict[str, Tensor]:
        """Teacher embeddings by resolution [V x N, D], from the cache if it has all of them."""
        side = views["global"].shape[-1]
        if (
            self.cache is not None
            and (cached := self.cache.read(batch.epoch, batch.indices, side)) is not None
        ):
            on_host = {name: cached[name].flatten(0, 1) for name in flat}
            if flat["global"].is_cuda:  # only copies of page-locked memory are not waited for
                on_host = {name: rows.pin_memory() for name, rows in on_host.items()}
            return {
                name: on_host[name].to(view.device, non_blocking=True)
                for name, view in flat.items()
            }
        embeddings = {name: self._of_views(view) for name, view in views.items()}
        # The key of the cache names the teacher's number format.
        if self.cache is not None and not self.teacher.overflow.seen():
            by_view = {
                name: embeddings[name].view(*view.shape[:2], -1) for name, view in views.items()
            }
            self.cache.write_soon(batch.epoch, batch.indices, by_view, side)
        return embeddings

    def _of_views(self, views: Tensor) -> Tensor:
        """Teacher embeddings [V x N, D] of views [V, N, 3, S, S].

        A teacher that normalises by batch sees groups of a view's images.
        """
        config = self.config
        if not (isinstance(config, BatchTeacherConfig) and config.has_batch_teacher):
            embeddings: Tensor = self.teacher(views.flatten(0, 1))
            return embeddings
        num_groups = number_of_groups(views.shape[1], config.bn_group_size)
        groups = [group for view in views for group in view.tensor_split(num_groups)]
        return torch.cat([self.teacher(group) for group in groups])
