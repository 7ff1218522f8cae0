"""Times the value and the gradient of the objective."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from seed_exp.benchmarks.measure import BenchReport, Contender, interleave, machine
from seed_exp.benchmarks.references import plain_loss
from seed_exp.config.schema import BenchConfig, SeedConfig
from seed_exp.engine.distributed import local_device
from seed_exp.methods.objectives import SEED
from seed_exp.models.teachers import EMBEDDING_DIM

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps student embeddings [N, D], teacher embeddings [N, D] and queue [K, D] to a scalar."""

CHECKED_ROWS = 64
"""Rows on which both ways are compared with the formula in float64."""


def bench(config: BenchConfig) -> BenchReport:
    """Measures rows per second of value and gradient, and the memory they need.

    Raises:
        ValueError: the objective is not SEED's, the only one whose plain way is written here.
    """
    if type(config.objective) is not SeedConfig:
        raise ValueError(
            "bench=loss compares with the plain way of objective=seed, got objective="
            f"{config.objective.name}"
        )
    device = local_device(config.device)
    torch.manual_seed(0)
    student, teacher, queue = (
        F.normalize(torch.randn(num, EMBEDDING_DIM, device=device), dim=1)
        for num in (config.rows, config.rows, config.objective.queue_length)
    )
    options, objective = config.objective, SEED

    def ours(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
        return objective.loss(
            student, teacher, objective.target(teacher, queue, options), queue, options
        )

    def plain(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
        return plain_loss(
            student,
            teacher,
            queue,
            tau_student=options.tau_student,
            tau_teacher=options.tau_teacher,
        )

    def mixed(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            return plain(student, teacher, queue)

    ways = [
        Contender("plain", lambda: value_and_gradient(mixed, student, teacher, queue), config.rows),
        Contender("ours", lambda: value_and_gradient(ours, student, teacher, queue), config.rows),
        Contender("matrix products", lambda: products(student, teacher, queue), config.rows),
    ]
    *rows, bound = interleave(ways, seconds=config.seconds, device=device)
    few = student[:CHECKED_ROWS], teacher[:CHECKED_ROWS], queue
    exact = value_and_gradient(plain, *(tensor.double() for tensor in few))
    facts = {
        "rows x queue x dim": f"{config.rows} x {len(queue)} x {EMBEDDING_DIM}",
        "temperatures": f"student {options.tau_student:g}, teacher {options.tau_teacher:g}",
        "matrix products": f"{6 * config.rows * queue.numel() / bound.median_s / 1e9:,.0f} GFLOP/s",
        "error of ours": relative_errors(value_and_gradient(ours, *few), exact),
        "error of plain": relative_errors(value_and_gradient(mixed, *few), exact),
    }
    return BenchReport(
        "loss, value and gradient", "rows/s", rows, "plain", [bound], facts | machine(device)
    )


def value_and_gradient(
    loss: Loss, student: Tensor, teacher: Tensor, queue: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the loss and its gradient [N, D] with respect to the student's embeddings."""
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher, queue)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def products(student: Tensor, teacher: Tensor, queue: Tensor) -> None:
    """Computes the three matrix products that every such loss needs.

    They are the similarities of student and of teacher, and the student's gradient.
    """
    for chunk in torch.split(queue, 4096):
        similarities = student @ chunk.T
        torch.mm(teacher, chunk.T, out=similarities)
        similarities @ chunk


def relative_errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> str:
    """Returns the relative errors of value and gradient, in words."""
    value, gradient = (
        float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
    )
    return f"{value:.1e} in the value, {gradient:.1e} in the gradient (relative, against float64)"
