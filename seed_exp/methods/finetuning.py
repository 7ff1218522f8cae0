"""Whole students with a new classifier, trained on labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.engine.method import Method
from seed_exp.models.students import Student
from seed_exp.views.recipe import HostBatch


class Finetune(Method):
    """Every student x learning rate is one network: a copy of its encoder with a linear classifier.

    Encoders are trained as a whole, in training mode: batch norm with the batch's statistics,
    dropout where they have it.

    Args:
        students: By name; left as they are.
        lrs: Learning rates of the encoders, for the names of the networks.
        classifier_lr_factor: Learning rate of a classifier as a multiple of its encoder's.
        num_classes: C.
        seed: Seed of the classifiers' initial weights, the same for every learning rate.
    """

    def __init__(
        self,
        students: Mapping[str, Student],
        lrs: Sequence[float],
        classifier_lr_factor: float,
        num_classes: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.lr_factors = {"classifier": classifier_lr_factor}
        self.lrs = {f"{name}/lr{lr:g}": lr for name in students for lr in lrs}
        self.trainable = {
            f"{name}/lr{lr:g}": _Classified(student, num_classes, seed)
            for name, student in students.items()
            for lr in lrs
        }

    def prepare(self, views: dict[str, Tensor], batch: HostBatch) -> tuple[Tensor, Tensor]:
        """The first global view of each image [N, 3, S, S], and the labels [N]."""
        return views["global"][0], batch.labels

    def loss(
        self,
        name: str,  # noqa: ARG002
        network: nn.Module,
        prepared: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        """Cross-entropy in nats and top-1 accuracy in percent on the training views."""
        images, labels = prepared
        logits = network(images)
        top1 = 100 * (logits.detach().argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "train_top1": top1}


class _Classified(nn.Module):
    """Maps images [N, 3, S, S] to logits [N, C]; the classifier ignores autocast."""

    def __init__(self, student: Student, num_classes: int, seed: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(student.encoder).requires_grad_(True)
        self.classifier = nn.Linear(student.num_features, num_classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.classifier.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images)
        # bfloat16 logits near 10 are steps of 0.06: classes would tie.
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.classifier(features.to(self.classifier.weight.dtype))
        return logits
