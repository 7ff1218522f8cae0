"""Losses between embeddings and a queue, as pure functions that never build the N x (K+1) matrix of similarities.

All of them run over the queue in chunks and keep, per row, a running maximum, the sums that the loss needs and the sums
that its gradient needs (the running softmax of Milakov and Gimelshein, arXiv:1805.02867). One pass gives value and gradient;
memory grows with N x chunk, not with K. They compute in float32 whatever autocast says: at tau_teacher = 1e-4 a
half-precision cosine moves a logit by several units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 21
"""Similarities held at a time, per distribution (8 MiB of float32)."""


def seed_loss(student: Tensor, teacher: Tensor, queue: Tensor, *, tau_student: float, tau_teacher: float) -> Tensor:
    """Cross-entropy from the teacher's to the student's similarity distribution over D+ = [own teacher; queue].

    SEED, arXiv:2101.04731, Section 3.2: mean_i H(softmax(t_i . D+ / tau_teacher), softmax(s_i . D+ / tau_student)).

    Args:
        student: Embeddings s of the batch's views [N, D], unit length; the gradient flows here.
        teacher: Embeddings t of the same views [N, D], unit length; constant.
        queue: Teacher embeddings of earlier instances [K, D], unit length; constant.
        tau_student: Temperature > 0 of the student's distribution.
        tau_teacher: Temperature > 0 of the teacher's distribution; towards 0 the loss becomes `info_nce`.

    Returns:
        Scalar in nats, float32 also under autocast.

    Raises:
        ValueError: shapes disagree (all three are named in the message), or a temperature is not positive.
    """
    if not (tau_student > 0 and tau_teacher > 0):
        raise ValueError(f"temperatures must be positive, got tau_student={tau_student} and tau_teacher={tau_teacher}")
    return _cross_entropy(student, teacher, queue, tau_student, tau_teacher)


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
        ValueError: shapes disagree (all three are named in the message), or the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _cross_entropy(query, key, queue, temperature, tau_teacher=0.0)


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
        for chunk in torch.split(queue, _chunk_length(len(teacher))):
            logits = teacher @ chunk.T / tau_teacher
            weights, rescale = target.add(logits)
            mean_logit = mean_logit * rescale + (weights * logits).sum(1)
        return target.log_normaliser() - mean_logit / target.total


def _cross_entropy(student: Tensor, teacher: Tensor, queue: Tensor, tau_student: float, tau_teacher: float) -> Tensor:
    if student.ndim != 2 or student.shape != teacher.shape or queue.ndim != 2 or queue.shape[1] != student.shape[1]:
        raise ValueError(
            "need student [N, D], teacher [N, D] and queue [K, D], "
            f"got {list(student.shape)}, {list(teacher.shape)} and {list(queue.shape)}"
        )
    with torch.autocast(student.device.type, enabled=False):
        loss: Tensor = _CrossEntropy.apply(student.float(), teacher.float(), queue.float(), tau_student, tau_teacher)
    return loss


def _chunk_length(num_rows: int) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, num_rows))


class _RunningSoftmax:
    """Maximum [N] and total [N] of exp(logit - maximum) over the logits seen so far."""

    def __init__(self, logits: Tensor) -> None:
        self.maximum = logits
        self.total = torch.ones_like(logits)

    def add(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in logits [N, C]; returns their weights [N, C] and the factor [N] by which earlier sums must be rescaled."""
        maximum = torch.maximum(self.maximum, logits.amax(1))
        rescale = torch.exp(self.maximum - maximum)
        weights = torch.exp(logits - maximum[:, None])
        self.total = self.total * rescale + weights.sum(1)
        self.maximum = maximum
        return weights, rescale

    def log_normaliser(self) -> Tensor:
        return self.maximum + self.total.log()


class _CrossEntropy(torch.autograd.Function):
    """mean_i of log Z_i - sum_j p_ij l_ij, with l the student's logits, Z their normaliser and p the target.

    The target is softmax(t_i . D+ / tau_teacher), or all on the own embedding when tau_teacher is 0. The gradient with
    respect to s_i is (E_softmax(l)[d] - E_p[d]) / tau_student / N; both expectations are gathered in the same pass.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, queue: Tensor, tau_student: float, tau_teacher: float) -> Tensor:
        own = (student * teacher).sum(1) / tau_student
        prediction = _RunningSoftmax(own)
        predicted = teacher.clone()  # sum_j exp(l_ij - max_i) d_j, own embedding first
        target = _RunningSoftmax((teacher * teacher).sum(1) / tau_teacher) if tau_teacher > 0 else None
        wanted, wanted_logit = teacher.clone(), own  # sum_j of the target's weights times d_j and times l_ij

        for chunk in torch.split(queue, _chunk_length(len(student))):
            logits = student @ chunk.T / tau_student
            if target is not None:
                weights, rescale = target.add(teacher @ chunk.T / tau_teacher)
                wanted = torch.addmm(wanted * rescale[:, None], weights, chunk)
                wanted_logit = wanted_logit * rescale + (weights * logits).sum(1)
            weights, rescale = prediction.add(logits)
            predicted = torch.addmm(predicted * rescale[:, None], weights, chunk)

        total = target.total if target is not None else torch.ones_like(own)
        loss = (prediction.log_normaliser() - wanted_logit / total).mean()
        gradient = predicted / prediction.total[:, None] - wanted / total[:, None]
        ctx.save_for_backward(gradient / (tau_student * len(student)))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None, None
