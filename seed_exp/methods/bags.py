"""BINGO (arXiv:2107.01691): an image, one of its bag and a mix of both pass through the student.

A bag is an image's nearest neighbours among all training images, by the teacher's features; they
are found before training. Each image of a step comes with one image of its bag, drawn anew in each
epoch. Views are a function of (seed, epoch, image), so the other image's views are those that it
has in this epoch as an image of its own, and any process can make them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seed_exp.base.registry import lookup
from seed_exp.config.schema import BingoBagsConfig, ObjectiveConfig
from seed_exp.methods.collapse import embedding_std
from seed_exp.methods.losses import bag_loss, info_nce
from seed_exp.methods.objectives import OBJECTIVES
from seed_exp.methods.seed import Seed
from seed_exp.methods.teacher_cache import TeacherCache
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.students import Student
from seed_exp.views.cutmix import NUM_CUTMIX_DRAWS, cutmix, cutmix_boxes
from seed_exp.views.draws import uniforms
from seed_exp.views.recipe import HostBatch

BAG_STREAM, CUTMIX_STREAM = 3 << 14, (3 << 14) + 1
"""Streams of random numbers beyond those of the views, of mixup and of plug-ins."""


class PairTargets(NamedTuple):
    """Part of a batch that the whole fleet shares."""

    own: Tensor
    """The student's view of each image [N, 3, S, S]."""
    other: Tensor
    """Its view of the image from the bag."""
    mixed: Tensor
    """The first with a rectangle of the second in it."""
    own_share: Tensor
    """Share of the first in the mix [N]."""
    teacher: dict[str, Tensor]
    """The teacher's embedding of another view of each image, {"global": [N, D]}."""
    other_teacher: Tensor
    """The teacher's embedding of another view of the image from the bag [N, D]."""
    own_only: bool
    """Whether a view that is not mixed has its own image as the only positive."""


class BagSeed(Seed):
    """The walk of `Seed` with pairs of images; the queue gets the embeddings of the first only.

    Rows of a batch are pairs: an image, then the one from its bag. The students see each image's
    first global view, the teacher the second.

    Args:
        bags: Numbers of the images in each image's bag [M, bag size].
        **others: As those of `Seed`.
    """

    config: BingoBagsConfig
    rows_per_image = 2

    def __init__(
        self,
        students: dict[str, Student],
        teacher: Teacher,
        config: ObjectiveConfig,
        resolutions: Iterable[str],
        seed: int,
        cache: TeacherCache | None = None,
        *,
        bags: Tensor,
    ) -> None:
        super().__init__(students, teacher, config, resolutions, seed, cache)
        self.seed, self.bags = seed, bags.numpy()

    def rows(self, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Each image, followed by one of its bag: a function of seed, epoch and image."""
        draws = uniforms(self.seed, epoch, indices, BAG_STREAM, 1)[:, 0]
        places = (draws * self.bags.shape[1]).astype(np.int64)
        return np.stack([indices, self.bags[indices, places]], 1).reshape(-1)

    @torch.no_grad()
    def prepare(  # type: ignore[override]
        self, views: dict[str, Tensor], batch: HostBatch
    ) -> PairTargets:
        """Views and teacher embeddings of pairs; views [V, 2 x N, 3, S, S], V at least 2."""
        own, other = _apart(views["global"][0])
        boxes, share = cutmix_boxes(
            uniforms(
                self.seed, batch.epoch, batch.indices[0::2].numpy(), CUTMIX_STREAM, NUM_CUTMIX_DRAWS
            ),
            views["global"].shape[-1],
        )
        mixed = cutmix(own, other, torch.from_numpy(boxes).to(own.device, non_blocking=True))
        own_teacher, other_teacher = self._of_pairs(views, batch)
        self._new["global"].append(own_teacher)
        return PairTargets(
            own.contiguous(memory_format=torch.channels_last),
            other.contiguous(memory_format=torch.channels_last),
            mixed.contiguous(memory_format=torch.channels_last),
            torch.from_numpy(share).float().to(own.device, non_blocking=True),
            {"global": own_teacher},
            other_teacher,
            batch.epoch < self.config.own_epochs,
        )

    def loss(  # type: ignore[override]
        self, name: str, network: nn.Module, targets: PairTargets
    ) -> dict[str, Tensor]:
        """The student's loss, the mean of its three parts; mean cosine and std of embeddings."""
        queue, tau = self.queues["global"].embeddings, self.config.tau_student
        one, two = targets.teacher["global"], targets.other_teacher
        own, other, mixed = map(network, (targets.own, targets.other, targets.mixed))
        self._seen[name] = own.detach()
        if targets.own_only:
            parts = {
                "loss_own": info_nce(own, one, queue, temperature=tau),
                "loss_bag": info_nce(other, two, queue, temperature=tau),
            }
        else:
            parts = {
                "loss_own": self.objective.loss(own, one, two, queue, self.config),
                "loss_bag": self.objective.loss(other, two, one, queue, self.config),
            }
        parts["loss_mixed"] = bag_loss(
            mixed, one, two, queue, own_share=targets.own_share, temperature=tau
        )
        return {
            "loss": torch.stack(list(parts.values())).mean(),
            **parts,
            "teacher_cosine": (own.detach() * one).sum(1).mean(),
            "embedding_std": embedding_std(own),
        }

    def _of_pairs(self, views: dict[str, Tensor], batch: HostBatch) -> tuple[Tensor, Tensor]:
        """The teacher's embeddings of the second views: those of the images, those of the bags."""
        if self.cache is None:  # the teacher need not see the students' views
            own, other = self._of_views(torch.stack(_apart(views["global"][1]))).chunk(2)
            return own, other
        flat = {"global": views["global"].flatten(0, 1)}
        num_rows = len(batch.labels)
        return _apart(self._embeddings(views, flat, batch)["global"][num_rows : 2 * num_rows])


def _apart(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [2 x N, ...] of pairs as those of the images and those of their neighbours."""
    return rows[0::2], rows[1::2]


def needs_bags(config: ObjectiveConfig) -> bool:
    """Whether the objective compares pairs of images."""
    return lookup(OBJECTIVES, config.name, "objective").pairs


def any_bags(num_images: int, bag_size: int) -> Tensor:
    """Bags [num_images, bag_size] of the next images in number, for when only the work matters."""
    return (torch.arange(num_images)[:, None] + torch.arange(1, bag_size + 1)) % num_images
