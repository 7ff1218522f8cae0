"""The one door to torch.distributed.

Without torchrun or srun every function here is the identity of a single process.
"""

from __future__ import annotations

import datetime
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from seed_exp.base.slurm import torchrun_variables
from seed_exp.engine.failure import SharedFailure

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=10)
"""How long a rank waits for the others in training before it gives up."""
SETUP_TIMEOUT = datetime.timedelta(hours=12)
"""How long the ranks wait for the first one to download, unpack, index, evaluate and write."""


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun or srun started, with NCCL on GPUs and gloo on the CPU.

    Leaves them at the end.
    Inside of another one it does nothing: an evaluation in the job of a training.

    Raises:
        ValueError: an error ended another rank; with that rank's message.
    """
    os.environ |= torchrun_variables()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
    backend = "nccl" if device.type == "cuda" else "gloo"
    with SharedFailure(store, rank, world_size, _leave):
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
        )
        yield


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """The device of this process.

    `auto` is the GPU of its local rank where there is one, otherwise the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name} is unknown; use auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "device=cuda, but torch sees no GPU; "
            "use device=cpu, or check the driver and torch's CUDA build"
        )
    os.environ |= torchrun_variables()
    # A scheduler may show each process its own GPU only, or all of the machine's.
    index = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # Convolutions would otherwise round float32 to 10 bits, and in some containers all products
    # would, the loss's too.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # deterministic=true needs it, and CUDA reads it once in a process: at its first product, which
    # an earlier run of a local sweep may make. 32 MiB, what torch takes on a Hopper GPU anyway.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


@contextmanager
def rank0_first() -> Iterator[None]:
    """Runs the block on rank 0, then on the others.

    For files that the first one makes and the others read.
    """
    if world_size() == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    if rank() != 0:
        dist.barrier(group)
    yield
    if rank() == 0:
        dist.barrier(group)
    dist.destroy_process_group(group)


class Barrier:
    """Lets the ranks wait for each other, for up to SETUP_TIMEOUT.

    To be used after work of one rank alone, such as an evaluation or writing to a slow disk: in
    the next collective the others would wait for TIMEOUT only, and then end the job.
    """

    def __init__(self) -> None:
        # Not NCCL, whose timeout is that of the whole process group.
        self._group: Any = (
            dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT) if world_size() > 1 else None
        )

    def wait(self) -> None:
        """Returns when all ranks have called it."""
        if self._group is not None:
            dist.barrier(self._group)


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """The tensors [N, ...] of all ranks, concatenated in the order of ranks. No gradient.

    Returns:
        [N x world_size, ...].
    """
    if world_size() == 1:
        return tensor
    tensor = tensor.contiguous()  # first: the parts take its memory format, and NCCL copies bytes
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


@torch.no_grad()
def exchange(rows: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
    """The rows that all ranks send to this one, in the order of ranks. No gradient.

    Args:
        rows: Rows that this rank sends [N, ...], those for rank 0 first.
        to: How many of them go to each rank.
        of: How many each rank sends to this one.
    """
    rows = rows.contiguous()
    received = rows.new_empty(sum(of), *rows.shape[1:])
    dist.all_to_all_single(received, rows, list(of), list(to))
    return received


def mean(tensor: Tensor) -> Tensor:
    """Mean over ranks."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


class Vote:
    """Asks in every step for the ranks' largest number.

    The answer is that of the step before: nobody waits for the slowest.
    """

    def __init__(self) -> None:
        # Not NCCL: the GPU would have to finish its work before the host hears the answer.
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
        self._asked: tuple[Tensor, Any] | None = None

    def highest(self, number: int) -> int:
        """The largest number, >= 0, that a rank gave in the last call before this one.

        In a single process, in this one.
        """
        if self._group is None:
            return number
        before, votes = self._asked, torch.tensor(number)
        self._asked = (
            votes,
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group, async_op=True),
        )
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in their order; whatever can be pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def broadcast_buffers(module: nn.Module) -> None:
    """Gives every rank rank 0's buffers (running BN statistics).

    So evaluating on several ranks is one evaluation.
    """
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its gradients averaged over ranks.

    Buffers stay each rank's own until `broadcast_buffers`. DDP would broadcast them at every
    forward pass, and a network that sees several resolutions has several per step.
    """
    if world_size() == 1:
        return module
    device_ids = [device.index] if device.type == "cuda" else None
    renamed = (
        "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    )  # since torch 2.15
    own_buffers: dict[str, Any] = {
        "forward_sync_buffers" if renamed else "broadcast_buffers": False
    }
    return DistributedDataParallel(
        module, device_ids=device_ids, gradient_as_bucket_view=True, **own_buffers
    )


def no_sync(module: nn.Module, skip: bool) -> Any:
    """A context in which gradients are only added up locally, where `skip`.

    For all but the last part of a batch.
    """
    return (
        module.no_sync() if skip and isinstance(module, DistributedDataParallel) else nullcontext()
    )
