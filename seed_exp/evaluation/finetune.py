"""Accuracy of classifiers from their logits."""

from __future__ import annotations

from torch import Tensor


def top_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent.

    Args:
        logits: [n, C].
        labels: Classes [n].

    Returns:
        {"top1": ..., "top5": ...}; "top5" counts a hit among the five largest logits, or among all if C < 5.
    """
    hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {"top1": 100 * hit[:, 0].float().mean().item(), "top5": 100 * hit.any(1).float().mean().item()}
