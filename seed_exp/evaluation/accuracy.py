"""Accuracy of classifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from seed_exp.methods.linear_probe import encoder_of


@torch.no_grad()
def linear_accuracy(
    classifiers: Mapping[str, nn.Module], features: Mapping[str, Tensor], labels: Tensor
) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 accuracy of each classifier, in percent.

    Args:
        classifiers: Classifiers by name <encoder>/lr<rate>; each maps features to logits [n, C].
        features: Features [n, num_features] by name of the encoder.
        labels: Classes [n].

    Returns:
        {classifier: {"top1": ..., "top5": ...}}; "top5" counts a hit among the five largest logits,
        or among all if C < 5.
    """
    accuracy = {}
    for name, classifier in classifiers.items():
        device = next(classifier.parameters()).device
        parts = features[encoder_of(name)].split(4096)  # type: ignore[no-untyped-call]
        logits = torch.cat([classifier(rows.to(device)).cpu() for rows in parts])
        accuracy[name] = top_accuracy(logits, labels)
    return accuracy


def top_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent.

    Args:
        logits: Logits [n, C] of n images and C classes.
        labels: Classes [n].

    Returns:
        {"top1": ..., "top5": ...}; "top5" counts a hit among the five largest logits, or among all
        if C < 5. NaN where a logit is not finite: the network has diverged.
    """
    if not logits.isfinite().all():
        return {"top1": math.nan, "top5": math.nan}
    hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {
        "top1": 100 * hit[:, 0].float().mean().item(),
        "top5": 100 * hit.any(1).float().mean().item(),
    }
