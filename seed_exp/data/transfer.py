"""Copies batches from the host's memory to a GPU's."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress

import torch
from torch import Tensor

from seed_exp.data.batch import B, Batch

log = logging.getLogger("seed_exp")


def prefetch_to_gpu(batches: Iterable[B], device: torch.device) -> Generator[B, None, None]:
    """Yields the batches on the GPU, copied on a separate stream during the previous step.

    At most two batches are on the GPU: before the host has another one copied, it waits for the
    last step but one.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    in_use: deque[tuple[B, torch.cuda.Event]] = deque()
    try:
        for batch in batches:
            with torch.cuda.stream(stream):
                on_device = moved(batch, device)
            copied = stream.record_event()
            torch.cuda.current_stream(device).wait_event(copied)
            yield on_device
            # All kernels that read the batch have been queued. Its memory belongs to the copying
            # stream, which does not know of them, so the batch is kept until they are done.
            in_use.append((on_device, torch.cuda.current_stream(device).record_event()))
            if len(in_use) == 2:
                in_use.popleft()[1].synchronize()
            copied.synchronize()  # before the workers get the host's buffer back
    finally:
        # After a fault of the GPU, every later call raises it too; here it would replace the error
        # that ends the iteration.
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)


def moved(batch: B, device: torch.device) -> B:
    """The batch on the device, except for its indices, by which the host reads files.

    Nothing waits for copies from page-locked memory.
    """
    on_device = batch.map(lambda tensor: tensor.to(device, non_blocking=True))
    return on_device._replace(indices=batch.indices)


def lock_pages(batch: Batch) -> list[Tensor]:
    """Locks the memory of a batch, so that the host need not wait for copies to a GPU.

    If the system refuses, one warning says so: copies from pageable memory are correct, only
    slower.

    Returns:
        The tensors to hand to `unlock_pages`.
    """
    locked: list[Tensor] = []

    def lock(tensor: Tensor) -> Tensor:
        torch.cuda.check_error(
            torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)  # type: ignore[no-untyped-call]
        )
        locked.append(tensor)
        return tensor

    try:
        batch.map(lock)
    except RuntimeError as error:
        _forget_error()
        _warn(str(error))
    return locked


def unlock_pages(locked: Iterable[Tensor]) -> None:
    """Undoes `lock_pages`; stays quiet if it fails, as every call does after a fault of the GPU."""
    for tensor in locked:
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()))  # type: ignore[no-untyped-call]
        except RuntimeError:
            _forget_error()


def _forget_error() -> None:
    # CUDA keeps the error of a failed call until it is asked for; PyTorch asks after the next
    # kernel and blames that kernel.
    with suppress(RuntimeError):
        torch.ones((), device="cuda")


@functools.cache  # otherwise every evaluation would repeat the warning
def _warn(reason: str) -> None:
    log.warning(
        "cannot lock the pages of shared memory (%s): going on with slower copies to the GPU",
        reason,
    )
