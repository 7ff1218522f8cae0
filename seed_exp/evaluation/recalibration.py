"""Batch norm's running statistics, measured again on images as evaluations see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.evaluation.features import Extractor


def recalibrate_batch_norm(
    encoders: Mapping[str, nn.Module], extract: Extractor, source: Source
) -> str:
    """Replaces running statistics, in place, by the means of batches' statistics over `source`.

    PreciseBN, arXiv:2105.07576, Section 3: every batch norm normalises with the batch's statistics
    and keeps their mean over all batches; dropout stays off. Multi-crop training leaves other
    statistics: means over views of all sizes. Batches are whole and the same in every call; their
    images are in random order, because folders list one class after the other.

    Args:
        encoders: Networks in evaluation mode, by name.
        extract: Device, precision and batch size, and the views that evaluation uses.
        source: The images.

    Returns:
        What was done, in words for the protocol of results.
    """
    layers = [layer for encoder in encoders.values() for layer in _layers(encoder)]
    order = np.random.default_rng(0).permutation(len(source)).astype(np.int64)
    together = extract.batch_size * distributed.world_size()
    order = order[: max(len(order) - len(order) % together, min(len(order), together))]
    momentum = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch then keeps the mean over all batches
        layer.train()
    extract({name: _silent(encoder) for name, encoder in encoders.items()}, source, order)
    for layer, before in zip(layers, momentum, strict=True):
        layer.eval()
        layer.momentum = before
        for statistics in (layer.running_mean, layer.running_var):
            if statistics is not None:  # as track_running_stats says
                statistics.copy_(distributed.mean(statistics.clone()))
    return (
        f"running statistics of batch norm from {len(order)} of the images {source.fingerprint()}, "
        f"in batches of {min(together, len(order))} over {distributed.world_size()} processes"
    )


def _layers(encoder: nn.Module) -> list[_BatchNorm]:
    return [
        module
        for module in encoder.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]


def _silent(encoder: nn.Module) -> Callable[[Tensor], Tensor]:
    """The encoder, with features of width 0: they are not needed and would take memory."""
    return lambda images: encoder(images)[:, :0]
