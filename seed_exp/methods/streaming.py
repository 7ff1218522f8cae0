"""The pass over a queue that never builds the N x (K+1) matrix of similarities: what the losses and
their targets are made of.

It takes the queue in chunks and keeps, per row, a running maximum and the sums that value and
gradient need (the running softmax of Milakov and Gimelshein, arXiv:1805.02867). One pass gives
both; memory grows with N x chunk, not with K.

Everything here is given float32, outside autocast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK_ELEMENTS = {"cpu": 1 << 20, "gpu": 1 << 22}
"""Similarities held at a time, 4 or 16 MiB: fewer were slower where other processes use the cores
too, or on a GPU.
"""
_SMALLEST_EXPONENT = -80.0
"""exp(-80) is about 2e-35: nothing beside a maximum of 1, and still a normal float32 when it is
multiplied by an embedding.
"""


def chunk_length(rows: Tensor) -> int:
    """How many vectors may be compared with all of `rows` [N, D] at a time."""
    return max(
        1, CHUNK_ELEMENTS["cpu" if rows.device.type == "cpu" else "gpu"] // max(1, len(rows))
    )


class RunningSoftmax:
    """Maximum [N] and total [N] of exp(logit - maximum) over the logits seen so far."""

    def __init__(self, logits: Tensor) -> None:
        self.maximum = logits
        self.total = torch.ones_like(logits)

    def add(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Turns logits [N, C] into their weights, in place; returns these and the factor [N] by
        which earlier sums rescale.
        """
        maximum = torch.maximum(self.maximum, logits.amax(1))
        rescale = torch.exp(self.maximum - maximum)
        # A cold teacher's weights would be denormal numbers, on which a CPU's matrix products are
        # 20 times slower.
        weights = logits.sub_(maximum[:, None]).clamp_min_(_SMALLEST_EXPONENT).exp_()
        self.total = self.total * rescale + weights.sum(1)
        self.maximum = maximum
        return weights, rescale

    def log_normaliser(self) -> Tensor:
        """Logarithm [N] of the sum of exp(logit) over the logits seen so far."""
        return self.maximum + self.total.log()


def expectation(
    rows: Tensor, own: Tensor | None, queue: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """Of softmax(rows . [own; queue] / tau), or over the queue alone: log-normaliser [N] and mean
    of [own; queue] [N, D].
    """
    if own is None:  # of a logit of -inf nothing is left when the first one of the queue comes
        softmax, total = (
            RunningSoftmax(rows.new_full((len(rows),), -math.inf)),
            torch.zeros_like(rows),
        )
    else:
        softmax, total = RunningSoftmax((rows * own).sum(1) / tau), own.clone()
    scaled = rows / tau
    for chunk in torch.split(queue, chunk_length(rows)):
        weights, rescale = softmax.add(scaled @ chunk.T)
        total = torch.addmm(total * rescale[:, None], weights, chunk)
    return softmax.log_normaliser(), total / softmax.total[:, None]


def nearest(rows: Tensor, queue: Tensor, num: int) -> Tensor:
    """Places in the queue of the `num` entries most similar to each row [N, num]; all of a smaller
    queue.
    """
    similarities, places = (
        rows.new_empty(len(rows), 0),
        torch.empty(len(rows), 0, dtype=torch.long, device=rows.device),
    )
    start = 0
    for chunk in torch.split(queue, chunk_length(rows)):
        values, columns = (rows @ chunk.T).topk(min(num, len(chunk)), dim=1)
        similarities, places = (
            torch.cat([similarities, values], 1),
            torch.cat([places, columns + start], 1),
        )
        similarities, columns = similarities.topk(min(num, similarities.shape[1]), dim=1)
        places = places.gather(1, columns)
        start += len(chunk)
    return places


class CrossEntropy(torch.autograd.Function):
    """mean_i of log Z_i - s_i . m_i / tau, with Z over [own; queue] or the queue alone and m the
    target's mean embedding.

    The gradient with respect to s_i is (E[d] - m_i) / tau / N, the mean E under the student's own
    distribution.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, own: Tensor | None, target: Tensor, queue: Tensor, tau: float
    ) -> Tensor:
        log_normaliser, mean = expectation(student, own, queue, tau)
        ctx.save_for_backward((mean - target) / (tau * len(student)))
        return (log_normaliser - (student * target).sum(1) / tau).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None, None


class LogSumExp(torch.autograd.Function):
    """log sum_j exp(s_i . d_j / tau) [N] over the queue.

    The gradient with respect to s_i is E[d] / tau, the mean under the student's own distribution.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, queue: Tensor, tau: float) -> Tensor:
        log_normaliser, mean = expectation(student, None, queue, tau)
        ctx.save_for_backward(mean / tau)
        return log_normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output[:, None] * gradient, None, None


class BinaryContrast(torch.autograd.Function):
    """mean_i of softplus(-x_i) + sum_j softplus(x_ij), with logits
    x = s_i . [own; queue] / tau - log K.

    The gradient with respect to s_i is (sum_j sigmoid(x_ij) d_j - sigmoid(-x_i) own_i) / tau / N.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, own: Tensor, queue: Tensor, tau: float) -> Tensor:
        shift, scaled = math.log(len(queue)), student / tau
        own_logits = (scaled * own).sum(1) - shift
        loss = F.softplus(-own_logits)
        gradient = -torch.sigmoid(-own_logits)[:, None] * own
        for chunk in torch.split(queue, chunk_length(student)):
            logits = scaled @ chunk.T - shift
            loss = loss + F.softplus(logits).sum(1)
            gradient.addmm_(logits.sigmoid_(), chunk)
        ctx.save_for_backward(gradient / (tau * len(student)))
        return loss.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None
