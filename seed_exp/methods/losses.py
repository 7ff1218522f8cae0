"""Losses between embeddings, as pure functions; those with a queue never build the N x (K+1) matrix
of similarities.

A student's logits are linear in the embeddings that they are the similarities to. Hence a
cross-entropy to a target distribution p over them depends on p through one vector only, their mean
m_i = sum_j p_ij d_j:

    - sum_j p_ij log softmax_j(s_i . D / tau) = log sum_j exp(s_i . d_j / tau) - s_i . m_i / tau

so the teacher's side is one pass over the queue (`streaming`) whatever the number of students, and
a student's is another. The objectives that are such a cross-entropy differ in the target only: how
p is chosen, and over what.

They compute in float32 whatever autocast says: at tau_teacher = 1e-4 a half-precision cosine moves
a logit by several units.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from seed_exp.methods.streaming import (
    BinaryContrast,
    CrossEntropy,
    LogSumExp,
    RunningSoftmax,
    chunk_length,
    expectation,
    nearest,
)


def seed_loss(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    *,
    tau_student: float,
    tau_teacher: float,
    target: Tensor | None = None,
) -> Tensor:
    """Cross-entropy from the teacher's to the student's similarity distribution over D+, which is
    [own teacher; queue].

    SEED, arXiv:2101.04731, Section 3.2:
    mean_i H(softmax(t_i . D+ / tau_teacher), softmax(s_i . D+ / tau_student)).

    Args:
        student: Embeddings s of the batch's views [N, D], unit length; the gradient flows here.
        teacher: Embeddings t of the same views [N, D], unit length; constant.
        queue: Teacher embeddings of earlier instances [K, D], unit length; constant.
        tau_student: Temperature > 0 of the student's distribution.
        tau_teacher: Temperature > 0 of the teacher's distribution; towards 0 the loss becomes
            `info_nce`.
        target: `seed_target(teacher, queue, tau_teacher=tau_teacher)` [N, D], where it is at hand:
            students share it.

    Returns:
        Scalar in nats, float32 also under autocast.

    Raises:
        ValueError: shapes disagree (they are named in the message), or a temperature is not
            positive.
    """
    if target is None:
        target = seed_target(teacher, queue, tau_teacher=tau_teacher)
    return _cross_entropy(student, teacher, target, queue, tau_student)


@torch.no_grad()
def seed_target(teacher: Tensor, queue: Tensor, *, tau_teacher: float | Tensor) -> Tensor:
    """Mean of D+ = [own teacher; queue] under the teacher's distribution: all that `seed_loss`
    needs of it.

    The distribution is softmax(t_i . D+ / tau_teacher).

    Args:
        teacher: Embeddings [N, D], unit length.
        queue: Teacher embeddings of earlier instances [K, D], unit length.
        tau_teacher: Temperature > 0, one for all or one for each row [N].

    Returns:
        [N, D], float32, of length up to 1: 1 where all weight is on one embedding.

    Raises:
        ValueError: shapes disagree (they are named in the message), or the temperature is not
            positive.
    """
    _check_shapes(teacher=teacher, queue=queue)
    with torch.autocast(teacher.device.type, enabled=False):
        teacher = teacher.float()
        if isinstance(tau_teacher, Tensor):  # which is not looked at: that would wait for the GPU
            return expectation(teacher / tau_teacher[:, None], teacher, queue.float(), 1.0)[1]
        _check_temperature("tau_teacher", tau_teacher)
        return expectation(teacher, teacher, queue.float(), tau_teacher)[1]


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
        ValueError: shapes disagree (they are named in the message), or the temperature is not
            positive.
    """
    return _cross_entropy(query, key, key, queue, temperature)


def compress_loss(student: Tensor, target: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy from a target distribution to the student's similarity distribution over the
    queue alone.

    CompRess with one queue, arXiv:2010.14713: mean_i H(softmax(t_i . D / T), softmax(s_i . D / T))
    with one temperature and without the instance's own embedding in D. The paper minimises the KL
    divergence, which is this minus the entropy of the target: the student's gradient is the same.

    Args:
        student: Embeddings s of the batch's views [N, D], unit length; the gradient flows here.
        target: The target distribution's mean of the queue [N, D], as `compress_target` gives it;
            constant.
        queue: Teacher embeddings of earlier instances [K, D], or prototypes, unit length; constant.
        temperature: T > 0.

    Returns:
        Scalar in nats, float32 also under autocast.

    Raises:
        ValueError: shapes disagree (they are named in the message), or the temperature is not
            positive.
    """
    return _cross_entropy(student, None, target, queue, temperature)


@torch.no_grad()
def compress_target(teacher: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Mean of the queue under the teacher's distribution softmax(t_i . D / T): all that
    `compress_loss` needs of it.

    Args:
        teacher: Embeddings [N, D], unit length.
        queue: Teacher embeddings of earlier instances [K, D], unit length.
        temperature: T > 0.

    Returns:
        [N, D], float32, of length up to 1.

    Raises:
        ValueError: shapes disagree (they are named in the message), or the temperature is not
            positive.
    """
    _check_temperature("temperature", temperature)
    _check_shapes(teacher=teacher, queue=queue)
    with torch.autocast(teacher.device.type, enabled=False):
        return expectation(teacher.float(), None, queue.float(), temperature)[1]


def bingo_loss(
    student: Tensor, teacher: Tensor, target: Tensor, queue: Tensor, *, temperature: float
) -> Tensor:
    """Cross-entropy of finding the own teacher embedding and the bag's among [own teacher; queue].

    After BINGO, arXiv:2107.01691:
    (1 - w) x -log softmax_own(s_i . D+ / T) + w x mean over bag b of -log softmax_b(s_i . D+ / T).
    What differs from the paper: see `bingo_target`. The paper's two terms, within and between
    instances, are two softmaxes whose negatives are the queue; here they share one, over
    D+ = [own teacher; queue], because the bag lies in the queue.

    Args:
        student: Embeddings s of the batch's views [N, D], unit length; the gradient flows here.
        teacher: Embeddings of the same views [N, D], unit length; constant.
        target: `bingo_target` of them [N, D]; constant.
        queue: Teacher embeddings of earlier instances [K, D], unit length; constant.
        temperature: T > 0.

    Returns:
        Scalar in nats, float32 also under autocast.

    Raises:
        ValueError: shapes disagree (they are named in the message), or the temperature is not
            positive.
    """
    return _cross_entropy(student, teacher, target, queue, temperature)


@torch.no_grad()
def bingo_target(teacher: Tensor, queue: Tensor, *, bag_size: int, weight: float) -> Tensor:
    """(1 - w) x own teacher embedding + w x mean of the bag: the embeddings in the queue that are
    most similar to it.

    The bags of BINGO, arXiv:2107.01691, are the nearest neighbours in the whole data set, found
    before training; a view of one of them, drawn at random, is passed through student and teacher.
    Here the bag is looked up in the queue at every step (online) and only its teacher embeddings
    are used: no views of other images, no mix of two images by CutMix, and all neighbours with
    equal weight in place of one at random, which is the mean of it.

    Args:
        teacher: Embeddings [N, D], unit length.
        queue: Teacher embeddings of earlier instances [K, D], unit length.
        bag_size: Neighbours in a bag; all of the queue if that is smaller.
        weight: w, from 0 to 1.

    Returns:
        [N, D], float32, of length up to 1.

    Raises:
        ValueError: shapes disagree (they are named in the message), or the weight is not from 0 to
            1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the bag's weight must be from 0 to 1, got {weight}")
    _check_shapes(teacher=teacher, queue=queue)
    with torch.autocast(teacher.device.type, enabled=False):
        teacher, queue = teacher.float(), queue.float()
        return torch.lerp(teacher, queue[nearest(teacher, queue, bag_size)].mean(1), weight)


def bag_loss(
    student: Tensor,
    own: Tensor,
    other: Tensor,
    queue: Tensor,
    *,
    own_share: Tensor | float,
    temperature: float,
) -> Tensor:
    """InfoNCE with two positives, each among itself and the queue.

    BINGO, arXiv:2107.01691, with l(s, t) = -log(exp(s . t / T) / (exp(s . t / T) +
    sum_j exp(s . d_j / T))): mean_i [w_i l(s_i, own_i) + (1 - w_i) l(s_i, other_i)].

    Args:
        student: Embeddings s of views [N, D], unit length; the gradient flows here.
        own: Teacher embeddings of another view of the same images [N, D], unit length; constant.
        other: Teacher embeddings of images from their bags [N, D], unit length; constant.
        queue: Teacher embeddings of earlier instances [K, D], unit length; constant.
        own_share: w, from 0 to 1: one for all, or one each [N].
        temperature: T > 0.

    Returns:
        Scalar in nats, float32 also under autocast.

    Raises:
        ValueError: shapes disagree (they are named in the message), or the temperature is not
            positive.
    """
    _check_temperature("temperature", temperature)
    _check_shapes(student=student, teacher=own, other=other, queue=queue)
    with torch.autocast(student.device.type, enabled=False):
        student = student.float()
        negatives: Tensor = LogSumExp.apply(student, queue.detach().float(), temperature)
        losses = []
        for positive in (own, other):
            logits = (student * positive.detach().float()).sum(1) / temperature
            losses.append(torch.logaddexp(logits, negatives) - logits)
        return (own_share * losses[0] + (1 - own_share) * losses[1]).mean()


def binary_contrastive_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, *, temperature: float
) -> Tensor:
    """Cross-entropy of telling the own teacher embedding from each of the K in the queue, pair by
    pair.

    Noise-contrastive estimation as in CRD, arXiv:1910.10699:
    mean_i [-log h(s_i, t_i) - sum_j log(1 - h(s_i, d_j))] with h(s, d) = P / (P + K / M) and
    P = exp(s . d / T) / Z for M images. CRD estimates Z from its first batch; here Z is M, its
    value for embeddings at right angles, and M cancels: h(s, d) = sigmoid(s . d / T - log K).

    Args:
        student: Embeddings s of the batch's views [N, D], unit length; the gradient flows here.
        teacher: Embeddings t of the same views [N, D], unit length; constant.
        queue: Teacher embeddings of earlier instances [K, D], unit length; constant.
        temperature: T > 0.

    Returns:
        Scalar in nats, float32 also under autocast; about log K + 1 at the start.

    Raises:
        ValueError: shapes disagree (they are named in the message), or the temperature is not
            positive.
    """
    _check_temperature("temperature", temperature)
    _check_shapes(student=student, teacher=teacher, queue=queue)
    with torch.autocast(student.device.type, enabled=False):
        loss: Tensor = BinaryContrast.apply(
            student.float(), teacher.float(), queue.float(), temperature
        )
    return loss


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_i |s_i - t_i|^2 = 2 - 2 mean_i cos(s_i, t_i).

    The regression of SimReg, arXiv:2201.05131, the distillation term of DisCo, arXiv:2104.09124,
    for one view, and the distance that SEED, arXiv:2101.04731, is compared with in its ablation.

    Args:
        student: Embeddings s of the batch's views [N, D], unit length; the gradient flows here.
        teacher: Embeddings t of the same views [N, D], unit length; constant.

    Returns:
        Scalar from 0 to 4, float32 also under autocast.

    Raises:
        ValueError: shapes disagree (they are named in the message).
    """
    _check_shapes(student=student, teacher=teacher)
    with torch.autocast(student.device.type, enabled=False):
        return (student.float() - teacher.detach().float()).square().sum(1).mean()


def coss_loss(student: Tensor, teacher: Tensor, *, weight: float) -> Tensor:
    """Negative cosines of rows, and of columns: each dimension of the space over the batch.

    CoSS, arXiv:2409.13939: -mean_i cos(s_i, t_i) - lambda mean_d cos(S_d, T_d) with S_d, T_d the
    columns of the N x D embeddings. The paper's columns are those of features before any
    normalisation; ours are of unit embeddings.

    Args:
        student: Embeddings s of the batch's views [N, D], unit length; the gradient flows here.
        teacher: Embeddings t of the same views [N, D], unit length; constant.
        weight: lambda, not negative.

    Returns:
        Scalar from -1 - lambda to 1 + lambda, float32 also under autocast.

    Raises:
        ValueError: shapes disagree (they are named in the message).
    """
    _check_shapes(student=student, teacher=teacher)
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.float(), teacher.detach().float()
        rows = F.cosine_similarity(student, teacher, dim=1).mean()
        columns = F.cosine_similarity(student, teacher, dim=0).mean()
        return -rows - weight * columns


def regression_loss(student: Tensor, target: Tensor, *, smooth_share: float) -> Tensor:
    """(1 - w) mean_i (1 - cos(s_i, t_i)) + w mean_i mean_d smooth-L1(s_id - t_id).

    The loss of UNIC, arXiv:2408.05088, with w = 0.5 in its released code, and of EUPE's patches,
    arXiv:2603.22387, with w = 0.1. smooth-L1(x) = x^2 / 2 where |x| < 1, else |x| - 1/2.

    Args:
        student: Predictions s [N, D] of any length; the gradient flows here.
        target: Targets t [N, D], standardised so that no dimension outweighs others; constant.
        smooth_share: w, from 0 to 1.

    Returns:
        Scalar, not negative, float32 also under autocast.

    Raises:
        ValueError: shapes disagree (they are named in the message).
    """
    _check_shapes(student=student, teacher=target)
    with torch.autocast(student.device.type, enabled=False):
        student, target = student.float(), target.detach().float()
        apart = 1 - F.cosine_similarity(student, target, dim=1).mean()
        return torch.lerp(apart, F.smooth_l1_loss(student, target), smooth_share)


@torch.no_grad()
def target_entropy(teacher: Tensor, queue: Tensor, *, tau_teacher: float | Tensor) -> Tensor:
    """Entropy of each row's target distribution softmax(t_i . D+ / tau_teacher) over
    D+ = [own teacher; queue].

    Args:
        teacher: Embeddings [N, D], unit length.
        queue: Teacher embeddings of earlier instances [K, D], unit length.
        tau_teacher: Temperature > 0, one for all or one for each row [N].

    Returns:
        [N] in nats, from 0 (one-hot) to log(K + 1); its exponential is the effective number of
        neighbours.
    """
    with torch.autocast(teacher.device.type, enabled=False):
        teacher, queue = teacher.float(), queue.float()
        per_row = tau_teacher[:, None] if isinstance(tau_teacher, Tensor) else tau_teacher
        target = RunningSoftmax((teacher * teacher).sum(1) / tau_teacher)
        mean_logit = target.maximum.clone()
        for chunk in torch.split(queue, chunk_length(teacher)):
            logits = teacher @ chunk.T / per_row
            weights, rescale = target.add(logits.clone())
            mean_logit = mean_logit * rescale + (weights * logits).sum(1)
        return target.log_normaliser() - mean_logit / target.total


def _check_temperature(name: str, temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperatures must be positive, got {name}={temperature}")


def _check_shapes(**embeddings: Tensor) -> None:
    """The first of them are rows [N, D]; the others must be as large, and the one named queue as
    wide.
    """
    rows = next(iter(embeddings.values()))
    expected = {role: rows.shape[1:] if role == "queue" else rows.shape for role in embeddings}
    found = {
        role: tensor.shape[1:] if role == "queue" else tensor.shape
        for role, tensor in embeddings.items()
    }
    if rows.ndim != 2 or found != expected:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in embeddings.items())
        raise ValueError(f"embeddings must be [N, D] and the queue [K, D], got {shapes}")


def _cross_entropy(
    student: Tensor, own: Tensor | None, target: Tensor, queue: Tensor, tau: float
) -> Tensor:
    _check_temperature("tau_student", tau)
    _check_shapes(
        student=student, **({} if own is None else {"teacher": own}), target=target, queue=queue
    )
    with torch.autocast(student.device.type, enabled=False):
        own = None if own is None else own.float()
        loss: Tensor = CrossEntropy.apply(student.float(), own, target.float(), queue.float(), tau)
    return loss
