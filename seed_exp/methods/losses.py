"""Losses between embeddings and a queue, as pure functions that never build the N x (K+1) matrix of similarities.

All of them run over the queue in chunks and keep, per row, a running maximum and the sums that value and gradient need (the
running softmax of Milakov and Gimelshein, arXiv:1805.02867). One pass gives both; memory grows with N x chunk, not with K.

A student's logits are linear in the embeddings that they are the similarities to. Hence a cross-entropy to a target
distribution p over them depends on p through one vector only, their mean m_i = sum_j p_ij d_j:

    - sum_j p_ij log softmax_j(s_i . D / tau) = log sum_j exp(s_i . d_j / tau) - s_i . m_i / tau

so the teacher's side is one pass whatever the number of students, and a student's is another.

They compute in float32 whatever autocast says: at tau_teacher = 1e-4 a half-precision cosine moves a logit by several units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = {"cpu": 1 << 20, "gpu": 1 << 22}
"""Similarities held at a time, 4 or 16 MiB: fewer were slower where other processes use the cores too, or on a GPU."""
_SMALLEST_EXPONENT = -80.0
"""exp(-80) is about 2e-35: nothing beside a maximum of 1, and still a normal float32 when it is multiplied by an embedding."""


def seed_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, *, tau_student: float, tau_teacher: float, target: Tensor | None = None
) -> Tensor:
    """Cross-entropy from the teacher's to the student's similarity distribution over D+ = [own teacher; queue].

    SEED, arXiv:2101.04731, Section 3.2: mean_i H(softmax(t_i . D+ / tau_teacher), softmax(s_i . D+ / tau_student)).

    Args:
        student: Embeddings s of the batch's views [N, D], unit length; the gradient flows here.
        teacher: Embeddings t of the same views [N, D], unit length; constant.
        queue: Teacher embeddings of earlier instances [K, D], unit length; constant.
        tau_student: Temperature > 0 of the student's distribution.
        tau_teacher: Temperature > 0 of the teacher's distribution; towards 0 the loss becomes `info_nce`.
        target: `seed_target(teacher, queue, tau_teacher=tau_teacher)` [N, D], where it is at hand: students share it.

    Returns:
        Scalar in nats, float32 also under autocast.

    Raises:
        ValueError: shapes disagree (they are named in the message), or a temperature is not positive.
    """
    if target is None:
        target = seed_target(teacher, queue, tau_teacher=tau_teacher)
    return _cross_entropy(student, teacher, target, queue, tau_student)


@torch.no_grad()
def seed_target(teacher: Tensor, queue: Tensor, *, tau_teacher: float) -> Tensor:
    """Mean of D+ = [own teacher; queue] under the teacher's distribution softmax(t_i . D+ / tau_teacher): all that `seed_loss`
    needs of it.

    Args:
        teacher: Embeddings [N, D], unit length.
        queue: Teacher embeddings of earlier instances [K, D], unit length.
        tau_teacher: Temperature > 0.

    Returns:
        [N, D], float32, of length up to 1: 1 where all weight is on one embedding.

    Raises:
        ValueError: shapes disagree (they are named in the message), or the temperature is not positive.
    """
    _check("tau_teacher", tau_teacher, teacher=teacher, queue=queue)
    with torch.autocast(teacher.device.type, enabled=False):
        teacher, queue = teacher.float(), queue.float()
        own = (teacher * teacher).sum(1) / tau_teacher
        return _expectation(teacher, own, teacher, queue, tau_teacher)[1]


def info_nce(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of finding each query's own key among [own key; queue].

    MoCo, arXiv:1911.05722, Eq. 1: mean_i -log(exp(q_i . k_i / T) / sum_j exp(q_i . k_j / T)).

    Args:
        query: Embeddings [N, D], unit length; the gradient flows here.
        key: Embeddings of another view of the same instances [N, D], unit length; constant.
        queue: Keys of earlier instances [K, D], unit length; constant.
        temperature: T > 0.

    Returns:
        Scalar in nats, float32 also under autocast.

    Raises:
        ValueError: shapes disagree (they are named in the message), or the temperature is not positive.
    """
    return _cross_entropy(query, key, key, queue, temperature)


@torch.no_grad()
def target_entropy(teacher: Tensor, queue: Tensor, *, tau_teacher: float) -> Tensor:
    """Entropy of each row's target distribution softmax(t_i . D+ / tau_teacher) over D+ = [own teacher; queue].

    Args:
        teacher: Embeddings [N, D], unit length.
        queue: Teacher embeddings of earlier instances [K, D], unit length.
        tau_teacher: Temperature > 0.

    Returns:
        [N] in nats, from 0 (one-hot) to log(K + 1); its exponential is the effective number of neighbours.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        teacher, queue = teacher.float(), queue.float()
        target = _RunningSoftmax((teacher * teacher).sum(1) / tau_teacher)
        mean_logit = target.maximum.clone()
        for chunk in torch.split(queue, _chunk_length(teacher)):
            logits = teacher @ chunk.T / tau_teacher
            weights, rescale = target.add(logits.clone())
            mean_logit = mean_logit * rescale + (weights * logits).sum(1)
        return target.log_normaliser() - mean_logit / target.total


def _check(name: str, temperature: float, **embeddings: Tensor) -> None:
    *rows, queue = embeddings.values()
    if not temperature > 0:
        raise ValueError(f"temperatures must be positive, got {name}={temperature}")
    if rows[0].ndim != 2 or any(row.shape != rows[0].shape for row in rows) or queue.shape[1:] != rows[0].shape[1:]:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in embeddings.items())
        raise ValueError(f"embeddings must be [N, D] and the queue [K, D], got {shapes}")


def _cross_entropy(student: Tensor, own: Tensor, target: Tensor, queue: Tensor, tau: float) -> Tensor:
    _check("tau_student", tau, student=student, teacher=own, target=target, queue=queue)
    with torch.autocast(student.device.type, enabled=False):
        loss: Tensor = _CrossEntropy.apply(student.float(), own.float(), target.float(), queue.float(), tau)
    return loss


def _chunk_length(rows: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS["cpu" if rows.device.type == "cpu" else "gpu"] // max(1, len(rows)))


class _RunningSoftmax:
    """Maximum [N] and total [N] of exp(logit - maximum) over the logits seen so far."""

    def __init__(self, logits: Tensor) -> None:
        self.maximum = logits
        self.total = torch.ones_like(logits)

    def add(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Turns logits [N, C] into their weights, in place; returns these and the factor [N] by which earlier sums rescale."""
        maximum = torch.maximum(self.maximum, logits.amax(1))
        rescale = torch.exp(self.maximum - maximum)
        # A cold teacher's weights would be denormal numbers, on which a CPU's matrix products are 20 times slower.
        weights = logits.sub_(maximum[:, None]).clamp_min_(_SMALLEST_EXPONENT).exp_()
        self.total = self.total * rescale + weights.sum(1)
        self.maximum = maximum
        return weights, rescale

    def log_normaliser(self) -> Tensor:
        return self.maximum + self.total.log()


def _expectation(rows: Tensor, own_logits: Tensor, own: Tensor, queue: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Of softmax over [own logit; rows . queue / tau]: log-normaliser [N] and mean of [own; queue] [N, D]."""
    softmax, total, scaled = _RunningSoftmax(own_logits), own.clone(), rows / tau
    for chunk in torch.split(queue, _chunk_length(rows)):
        weights, rescale = softmax.add(scaled @ chunk.T)
        total = torch.addmm(total * rescale[:, None], weights, chunk)
    return softmax.log_normaliser(), total / softmax.total[:, None]


class _CrossEntropy(torch.autograd.Function):
    """mean_i of log Z_i - s_i . m_i / tau, with Z over [own; queue] and m the target's mean embedding.

    The gradient with respect to s_i is (E[d] - m_i) / tau / N, the mean E under the student's own distribution.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, own: Tensor, target: Tensor, queue: Tensor, tau: float) -> Tensor:
        log_normaliser, mean = _expectation(student, (student * own).sum(1) / tau, own, queue, tau)
        ctx.save_for_backward((mean - target) / (tau * len(student)))
        return (log_normaliser - (student * target).sum(1) / tau).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None, None
