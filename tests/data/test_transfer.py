"""The way to a GPU: what is waited for, and what may fail.

The GPU is a make-believe one, except where a test is marked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from ranks import other_children
from torch import Tensor

from seed_exp.data import transfer
from seed_exp.data.loader import load_batches
from seed_exp.engine import progress as progress_module
from seed_exp.engine.progress import Progress
from seed_exp.views.recipe import EvalViews, HostBatch

CUDA = torch.device("cuda")
COPY_SECONDS = 0.01
ORDER = [(0, np.arange(4) + 4 * (step % 10)) for step in range(40)]


class Stream:
    """Works in order; the host learns nothing of it until it synchronises with an event."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.idle_at = gpu, 0.0

    def queue(self, seconds: float) -> None:
        self.idle_at = max(self.gpu.now, self.idle_at) + seconds

    def record_event(self) -> Event:
        return Event(self.gpu, self.idle_at)

    def wait_event(self, event: Event) -> None:
        self.idle_at = max(self.idle_at, event.at)


class Event:
    def __init__(self, gpu: Gpu, at: float) -> None:
        self.gpu, self.at = gpu, at

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.at)


class Gpu:
    """A GPU with a clock of its own, and a list of the memory that it has locked.

    The clock goes on only while the host waits or works.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.compute, self.copies = Stream(self), Stream(self)
        self.locked: set[int] = set()
        self.workers_when_locked: list[int] = []
        self.refuses_after: int | None = None
        self.faulty = False
        self.num_forgotten = 0

    def copying(self, stream: Stream) -> AbstractContextManager[None]:
        stream.queue(COPY_SECONDS)
        return nullcontext()

    def register(self, address: int, size: int, flags: int) -> int:
        if address in self.locked or len(self.locked) == self.refuses_after:
            return 801
        self.locked.add(address)
        self.workers_when_locked.append(len(other_children()))
        return 0

    def unregister(self, address: int) -> int:
        if self.faulty:
            return 700
        self.locked.remove(address)
        return 0

    def synchronize(self, device: torch.device) -> None:
        if self.faulty:
            raise RuntimeError("an illegal memory access was encountered")

    def forget(self) -> None:
        self.num_forgotten += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found, real_to = Gpu(), Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor.clone() if args[0] == CUDA else real_to(tensor, *args, **kwargs)

    def check_error(code: int) -> None:
        if code:
            raise RuntimeError(f"operation not supported ({code})")

    cudart = SimpleNamespace(cudaHostRegister=found.register, cudaHostUnregister=found.unregister)
    for name, fake in {
        "Stream": lambda device: found.copies,
        "stream": found.copying,
        "current_stream": lambda device: found.compute,
        "synchronize": found.synchronize,
        "cudart": lambda: cudart,
        "check_error": check_error,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(transfer, "_forget_error", found.forget)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(perf_counter=lambda: found.now))
    transfer._warn.cache_clear()
    return found


class SlowImages(tiny.Images):
    """Each takes a while of the GPU's clock."""

    def __init__(self, gpu: Gpu, seconds: float) -> None:
        super().__init__()
        self.gpu, self.seconds = gpu, seconds

    def image(self, index: int) -> Tensor:
        self.gpu.now += self.seconds
        return super().image(index)


def views() -> EvalViews:
    return EvalViews(tiny.views_config())


def on_gpu(source: tiny.Images, num_workers: int = 0) -> Any:
    return load_batches(source, views(), ORDER, num_workers=num_workers, device=CUDA)


def same(one: HostBatch, other: HostBatch) -> bool:
    tensors = [
        [*batch.views.values(), *batch.draws.values(), batch.labels, batch.indices]
        for batch in (one, other)
    ]
    return all(map(torch.equal, *tensors)) and one.epoch == other.epoch


@pytest.mark.parametrize("image_seconds", [0.0, 0.01, 0.1])
def test_waiting_for_the_gpu_is_not_waiting_for_data(gpu: Gpu, image_seconds: float) -> None:
    progress = Progress(0, len(ORDER), batch_size=4)
    began, source = 0.0, SlowImages(gpu, image_seconds)
    batches = load_batches(
        source, views(), ORDER, num_workers=0, device=CUDA, waiting=progress.waiting
    )
    for step, _ in enumerate(batches, 1):
        gpu.compute.queue(0.2)  # the host goes on at once
        if step % 10 == 0:
            gpu.compute.record_event().synchronize()  # as reading a loss does
            assert gpu.now - began >= 10 * 0.2
            expected = 100 * 10 * 4 * image_seconds / (gpu.now - began)
            assert progress.measure(step)["data_wait_percent"] == pytest.approx(expected)
            began = gpu.now
    assert step == len(ORDER)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_error_of_the_source_comes_out_while_it_is_waited_for(
    gpu: Gpu, num_workers: int, device: str
) -> None:
    progress = Progress(0, len(ORDER), batch_size=4)
    with pytest.raises(ValueError, match="unplugged") as caught:
        for _ in load_batches(
            tiny.Images(fail_after=9),
            views(),
            ORDER,
            num_workers=num_workers,
            device=torch.device(device),
            waiting=progress.waiting,
        ):
            pass
    assert type(caught.value) is ValueError


# --- page locks -----------------------------------------------------------------------------------


def assert_no_children() -> None:
    deadline = time.monotonic() + 20
    while other_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not other_children()


def test_pages_are_locked_as_long_as_the_workers_live(gpu: Gpu, logged: list[str]) -> None:
    with closing(on_gpu(tiny.Images(), num_workers=1)) as batches:
        next(batches)
        assert len(gpu.locked) == len(tensors_of_a_batch())
        assert set(gpu.workers_when_locked) == {1}  # a fork inherits no lock
    assert gpu.locked == set()
    assert_no_children()
    with closing(on_gpu(tiny.Images())) as batches:  # memory that nobody shares
        next(batches)
        assert gpu.locked == set()
    assert logged == []
    assert gpu.num_forgotten == 0


def tensors_of_a_batch() -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    views().empty(4).map(note)
    return found


@pytest.mark.parametrize("refuses_after", [0, 1])
def test_where_pages_cannot_be_locked_the_batches_are_the_same_and_one_warning_says_so(
    gpu: Gpu, refuses_after: int, logged: list[str]
) -> None:
    gpu.refuses_after = refuses_after
    expected = [tiny_batch(*item) for item in ORDER]
    for _ in range(2):  # the next evaluation says nothing new
        for batch, right in zip(on_gpu(tiny.Images(), num_workers=2), expected, strict=True):
            assert len(gpu.locked) == refuses_after
            assert same(batch, right)
        assert gpu.locked == set()
    assert logged == [
        "WARNING cannot lock the pages of shared memory (operation not supported (801)): "
        "going on with slower copies to the GPU"
    ]
    assert gpu.num_forgotten == 2
    assert_no_children()


def tiny_batch(epoch: int, indices: Any) -> HostBatch:
    source, batch = tiny.Images(), views().empty(len(indices))
    views().host(
        [source.image(index) for index in indices.tolist()],
        source.labels[indices],
        epoch,
        indices,
        batch,
    )
    return batch._replace(epoch=epoch)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_fault_of_the_gpu_does_not_replace_the_error_that_showed_it(
    gpu: Gpu, num_workers: int
) -> None:
    def train() -> None:
        with closing(on_gpu(tiny.Images(), num_workers)) as batches:
            next(batches)
            gpu.faulty = True
            raise RuntimeError("loss.item() failed")

    with pytest.raises(RuntimeError, match=r"loss\.item\(\) failed"):
        train()
    assert_no_children()


def test_a_fault_of_the_gpu_does_not_replace_an_error_of_the_source(gpu: Gpu) -> None:
    def faulty(batches: Iterator[HostBatch]) -> None:
        for _ in batches:
            gpu.faulty = True

    with pytest.raises(ValueError, match="unplugged"):
        faulty(on_gpu(tiny.Images(fail_after=9), num_workers=1))
    assert_no_children()


@pytest.mark.gpu
def test_a_refused_lock_leaves_no_error_for_the_next_kernel(logged: list[str]) -> None:
    transfer._warn.cache_clear()
    batch = views().empty(4).map(Tensor.share_memory_)
    locked = transfer.lock_pages(batch)
    assert locked
    assert logged == []
    assert transfer.lock_pages(batch) == []  # locked already
    assert [
        line.startswith("WARNING cannot lock the pages of shared memory (") for line in logged
    ] == [True]
    assert torch.ones(3, device="cuda").sum().item() == 3
    for _ in range(2):  # the second time there is nothing to unlock
        transfer.unlock_pages(locked)
        assert torch.ones(3, device="cuda").sum().item() == 3
