"""Orthogonal matrices that spread the variance of principal components over all dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PLUS = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
"""The Hadamard matrix of order 2, by which Sylvester doubles one."""
ZERO = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
"""What stands for a zero of the conference matrix in Paley's second construction."""


def spreading_rotation(variances: Tensor) -> Tensor:
    """An orthogonal matrix R [D, D] with diag(R diag(variances) R^T) equal in all places.

    It is a Hadamard matrix over sqrt(D), whatever the variances, where `hadamard` has one of this
    order. For other orders it is the discrete Hartley transform, which nearly does it, times at
    most D - 1 rotations in planes of two dimensions, each of which gives one dimension exactly the
    mean variance (Bendel and Mickey, 1978).

    Args:
        variances: Variances of D dimensions without correlations [D], float64.

    Returns:
        [D, D], float64.
    """
    order = len(variances)
    if (matrix := hadamard(order)) is not None:
        return matrix / math.sqrt(order)
    turns = torch.arange(order, dtype=torch.float64).outer(torch.arange(order)) % order
    angles = turns * (2 * math.pi / order)
    return _levelled((angles.cos() + angles.sin()) / math.sqrt(order), variances)


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix [order, order]: entries of 1 and -1, rows at right angles; float64.

    Made by Sylvester's doubling of a matrix of one of Paley's two constructions with a prime. This
    covers powers of two and most widths of networks, such as 384, 768, 1152, 1280, 1536 and 2048.

    Returns:
        None where these constructions have no such matrix, as for all orders above 2 that 4 does
        not divide.
    """
    for doublings in reversed(range(order.bit_length())):
        if order % (1 << doublings):
            continue
        if (matrix := _core(order >> doublings)) is not None:
            for _ in range(doublings):
                matrix = torch.kron(PLUS, matrix)
            return matrix
    return None


def _core(order: int) -> Tensor | None:
    """The Hadamard matrix of order 1, or that of one of Paley's constructions with a prime."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0 and _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _bordered(order - 1, -1)
    half = order // 2
    if order % 4 == 0 and (half - 1) % 4 == 1 and _is_prime(half - 1):
        conference, one = _bordered(half - 1, 1), torch.eye(half, dtype=torch.float64)
        return torch.kron(conference, PLUS) + torch.kron(one, ZERO)
    return None


def _bordered(prime: int, sign: int) -> Tensor:
    """Whether differences are squares modulo a prime (1, -1, or 0 for none), with a border."""
    numbers = torch.arange(prime)
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    character[(numbers * numbers) % prime] = 1
    character[0] = 0
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 0] = sign
    matrix[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _levelled(rotation: Tensor, variances: Tensor) -> Tensor:
    """The rotation, turned on until all dimensions have the mean of the variances."""
    covariance = rotation * variances @ rotation.T
    mean = variances.mean()
    for _ in range(len(variances) - 1):
        excess = covariance.diagonal() - mean
        low, high = int(excess.argmin()), int(excess.argmax())
        if excess[high] - excess[low] <= 1e-12 * mean:
            break
        # The tangent of the angle is a root of a x^2 + 2 b x + c = 0, with a > 0 > c.
        a, b, c = excess[high], covariance[low, high], excess[low]
        tangent = (-b + torch.copysign((b * b - a * c).sqrt(), -b)) / a
        cosine = 1 / (1 + tangent * tangent).sqrt()
        sine = cosine * tangent
        turn = torch.stack([cosine, sine, -sine, cosine]).view(2, 2)
        rows = [low, high]
        rotation[rows] = turn @ rotation[rows]
        covariance[rows] = turn @ covariance[rows]
        covariance[:, rows] = covariance[:, rows] @ turn.T
    return rotation
