"""Slow, obvious formulas written from the papers, in float64 and one row at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    exponentials = [math.exp(logit - largest) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


def log_softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    log_sum = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
    return [logit - log_sum for logit in logits]


def seed_loss(student: Tensor, teacher: Tensor, queue: Tensor, tau_student: float, tau_teacher: float) -> float:
    """SEED, arXiv:2101.04731, Section 3.2, a loop over instances and entries of D+."""
    student, teacher, queue = student.double(), teacher.double(), queue.double()
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        entries = [*queue, t]
        target = softmax([float(t @ d) / tau_teacher for d in entries])
        prediction = log_softmax([float(s @ d) / tau_student for d in entries])
        total -= sum(p * q for p, q in zip(target, prediction, strict=True))
    return total / len(student)


def seed_loss_matrix(student: Tensor, teacher: Tensor, queue: Tensor, tau_student: float, tau_teacher: float) -> Tensor:
    """The same formula with the N x (K+1) matrices written out, in float64 and differentiable."""
    student, teacher, queue = student.double(), teacher.double(), queue.double()
    target_logits = torch.cat([(teacher * teacher).sum(1, keepdim=True), teacher @ queue.T], 1) / tau_teacher
    logits = torch.cat([(student * teacher).sum(1, keepdim=True), student @ queue.T], 1) / tau_student
    return -(target_logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> float:
    """MoCo, arXiv:1911.05722, Eq. 1."""
    query, key, queue = query.double(), key.double(), queue.double()
    total = 0.0
    for q, k in zip(query, key, strict=True):
        total -= log_softmax([float(q @ k) / temperature, *(float(q @ d) / temperature for d in queue)])[0]
    return total / len(query)
