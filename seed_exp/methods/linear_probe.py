"""Linear classifiers on frozen features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.engine.method import Method
from seed_exp.views.recipe import HostBatch


class LinearProbe(Method):
    """One linear classifier per encoder and learning rate.

    The classifiers of an encoder share its forward pass. The protocol is MoCo's (arXiv:1911.05722,
    Section 4.1): the encoder is frozen with its running BN statistics, and the weights start from
    N(0, 0.01^2).

    Args:
        encoders: Encoders by name; they map images [N, 3, S, S] to features [N, num_features].
        lrs: Learning rates to try.
        num_classes: Number of classes C.
        seed: Seed of the initial weights, which are the same for every learning rate.
    """

    def __init__(
        self, encoders: dict[str, nn.Module], lrs: Sequence[float], num_classes: int, seed: int
    ) -> None:
        super().__init__()
        self.encoders = encoders
        # Not a ModuleDict: its names must not contain dots.
        self.shared = nn.ModuleList(encoders.values()).requires_grad_(False).eval()
        self.lrs = {f"{name}/lr{lr:g}": lr for name in encoders for lr in lrs}
        self.trainable = {
            classifier: _classifier(encoders[encoder_of(classifier)], num_classes, seed)
            for classifier in self.lrs
        }

    def train(self, mode: bool = True) -> LinearProbe:  # noqa: ARG002
        """Keeps evaluation mode, because the encoders' BN statistics must not move."""
        return super().train(False)

    @torch.no_grad()
    def prepare(
        self, views: dict[str, Tensor], batch: HostBatch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns each encoder's features [N, F] of the first global view, and the labels [N]."""
        return {
            name: encoder(views["global"][0]) for name, encoder in self.encoders.items()
        }, batch.labels

    def loss(
        self, name: str, network: nn.Module, prepared: tuple[dict[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Returns cross-entropy in nats and top-1 accuracy in percent on the training views."""
        features, labels = prepared
        # At learning rates of 30, bfloat16 is not precise enough.
        with torch.autocast(labels.device.type, enabled=False):
            logits = network(features[encoder_of(name)].float())
        top1 = 100 * (logits.detach().argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "train_top1": top1}

    def compile_shared(self) -> None:
        """Compiles the encoders."""
        for encoder in self.shared:
            encoder.compile(dynamic=False)


def encoder_of(classifier: str) -> str:
    """Returns the name of the encoder that a classifier belongs to."""
    return classifier.rpartition("/")[0]


def _classifier(encoder: nn.Module, num_classes: int, seed: int) -> nn.Linear:
    classifier = nn.Linear(encoder.num_features, num_classes)  # type: ignore[arg-type]
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(classifier.bias)
    return classifier
