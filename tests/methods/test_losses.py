from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import reference
import tiny
import torch
from torch import Tensor

from seed_exp.methods import losses, streaming

TAUS = [1.0, 0.07, 0.01, 1e-4]


@pytest.mark.parametrize("tau_teacher", TAUS)
def test_seed_loss_equals_the_formula(
    batch: tuple[Tensor, Tensor, Tensor], tau_teacher: float, chunk: None
) -> None:
    expected = reference.seed_loss(*batch, tau_student=0.2, tau_teacher=tau_teacher)
    assert losses.seed_loss(
        *batch, tau_student=0.2, tau_teacher=tau_teacher
    ).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tau_teacher", TAUS)
def test_gradient_equals_that_of_the_formula(
    batch: tuple[Tensor, Tensor, Tensor], tau_teacher: float, chunk: None
) -> None:
    student, teacher, queue = batch
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    (
        3 * losses.seed_loss(ours, teacher, queue, tau_student=0.2, tau_teacher=tau_teacher)
    ).backward()
    (3 * reference.seed_loss_matrix(theirs, teacher, queue, 0.2, tau_teacher)).backward()
    torch.testing.assert_close(
        ours.grad, theirs.grad, rtol=1e-5, atol=1e-5 * float(theirs.grad.abs().max())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau_teacher", TAUS)
def test_autocast_changes_nothing(
    batch: tuple[Tensor, Tensor, Tensor], tau_teacher: float, dtype: torch.dtype
) -> None:
    outside = losses.seed_loss(*batch, tau_student=0.2, tau_teacher=tau_teacher)
    with torch.autocast("cpu", dtype=dtype):
        inside = losses.seed_loss(*batch, tau_student=0.2, tau_teacher=tau_teacher)
    assert inside.dtype == torch.float32
    assert inside.item() == outside.item()


def test_cold_teacher_gives_info_nce(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    cold = losses.seed_loss(*batch, tau_student=0.2, tau_teacher=1e-6)
    assert cold.item() == pytest.approx(losses.info_nce(*batch, temperature=0.2).item(), rel=1e-6)


def test_info_nce_equals_the_formula(batch: tuple[Tensor, Tensor, Tensor], chunk: None) -> None:
    query = batch[0].clone().requires_grad_()
    loss = losses.info_nce(query, *batch[1:], temperature=0.2)
    assert loss.item() == pytest.approx(reference.info_nce(*batch, temperature=0.2), rel=1e-5)
    loss.backward()
    expected = batch[0].clone().requires_grad_()
    reference.seed_loss_matrix(expected, *batch[1:], 0.2, 1e-6).backward()
    torch.testing.assert_close(query.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_entropy_equals_the_formula_and_spans_its_range(
    batch: tuple[Tensor, Tensor, Tensor], chunk: None
) -> None:
    _, teacher, queue = batch
    for tau in TAUS:
        logits = (
            torch.cat([(teacher * teacher).sum(1, keepdim=True), teacher @ queue.T], 1).double()
            / tau
        )
        expected = torch.distributions.Categorical(logits=logits).entropy()
        entropy = losses.target_entropy(teacher, queue, tau_teacher=tau)
        torch.testing.assert_close(entropy.double(), expected, rtol=1e-3, atol=1e-4)
        assert entropy.min() >= -1e-4
        assert entropy.max() <= torch.tensor(24.0).log() + 1e-4


def test_only_the_student_gets_a_gradient(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, queue = (tensor.clone().requires_grad_() for tensor in batch)
    losses.seed_loss(student, teacher, queue, tau_student=0.2, tau_teacher=0.01).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert queue.grad is None


def test_memory_does_not_hold_the_similarity_matrix() -> None:
    num_rows, queue_size, dim = 256, 65536, 32
    student = tiny.embeddings(num_rows, dim, seed=0).requires_grad_()
    teacher, queue = (
        tiny.embeddings(num_rows, dim, seed=1),
        tiny.embeddings(queue_size, dim, seed=2),
    )
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        losses.seed_loss(student, teacher, queue, tau_student=0.2, tau_teacher=0.01).backward()
    assert largest <= max(streaming.CHUNK_ELEMENTS["cpu"], queue.numel())
    assert largest < num_rows * queue_size


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)
def test_multi_crop_at_full_size_takes_less_than_64_mib() -> None:
    """N = 1536 local views, K = 65536, D = 128; the N x (K+1) matrix alone would be 384 MiB."""
    code = """if True:
        import re, torch
        from pathlib import Path
        from seed_exp.methods.losses import seed_loss
        def embeddings(num): return torch.nn.functional.normalize(torch.randn(num, 128), dim=1)
        def kib(name):
            status = Path("/proc/self/status").read_text()
            return int(re.search(name + r":\\s*(\\d+)", status)[1])
        student, teacher = embeddings(1536).requires_grad_(), embeddings(1536)
        queue = embeddings(65536)
        seed_loss(student, teacher, queue[:1024], tau_student=0.2, tau_teacher=0.01).backward()
        Path("/proc/self/clear_refs").write_text("5")
        before = kib("VmRSS")
        seed_loss(student, teacher, queue, tau_student=0.2, tau_teacher=0.01).backward()
        print((kib("VmHWM") - before) / 1024)
    """
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert float(printed) < 64


def test_a_queue_of_a_million_gives_the_formula() -> None:
    student, teacher, queue = (
        tiny.embeddings(3, 16, seed=0),
        tiny.embeddings(3, 16, seed=1),
        tiny.embeddings(1 << 20, 16, seed=2),
    )
    similarities = [
        torch.cat([(s * teacher).sum(1, keepdim=True), s @ queue.T], 1).double()
        for s in (student, teacher)
    ]
    expected = (
        -((similarities[1] / 0.01).softmax(1) * (similarities[0] / 0.2).log_softmax(1))
        .sum(1)
        .mean()
    )
    loss = losses.seed_loss(student, teacher, queue, tau_student=0.2, tau_teacher=0.01)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_weight_is_a_denormal_number() -> None:
    """Denormal weights are right, but a CPU's matrix product of them is twenty times slower."""
    softmax = streaming.RunningSoftmax(torch.zeros(4))
    weights, _ = softmax.add(-torch.linspace(0, 200, 4000).view(4, 1000))
    assert weights.min() >= torch.finfo(torch.float32).tiny
    assert weights.min() < 1e-30


def test_bad_arguments_are_named() -> None:
    good = tiny.embeddings(3, 8, seed=0)
    with pytest.raises(ValueError, match=r"student \[3, 8\], teacher \[2, 8\].*queue \[3, 8\]"):
        losses.seed_loss(good, good[:2], good, tau_student=0.2, tau_teacher=0.01)
    with pytest.raises(ValueError, match=r"got .*\[3, 4\]"):
        losses.seed_loss(good, good, good[:, :4], tau_student=0.2, tau_teacher=0.01)
    with pytest.raises(ValueError, match="tau_teacher=0"):
        losses.seed_loss(good, good, good, tau_student=0.2, tau_teacher=0)
    with pytest.raises(ValueError, match="temperatures must be positive, got tau_student=-1"):
        losses.info_nce(good, good, good, temperature=-1)
