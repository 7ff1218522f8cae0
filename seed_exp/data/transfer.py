"""From the host's memory to a GPU's."""

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


def on_gpu(batches: Iterable[B], device: torch.device) -> Generator[B, None, None]:
    """The batches, copied on a stream of its own while the GPU is still busy with the step before.

    Two at most are on the GPU: the host waits for the last step but one before it has another batch copied.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    in_use: deque[tuple[B, torch.cuda.Event]] = deque()
    try:
        for batch in batches:
            with torch.cuda.stream(stream):
                moved = batch.map(lambda tensor: tensor.to(device, non_blocking=True))._replace(
                    indices=batch.indices
                )
            copied = stream.record_event()
            torch.cuda.current_stream(device).wait_event(copied)
            yield moved
            # All that reads the batch has been queued. Its memory belongs to the copying stream, which does not know of
            # these readers, so it is kept until they are done.
            in_use.append((moved, torch.cuda.current_stream(device).record_event()))
            if len(in_use) == 2:
                in_use.popleft()[1].synchronize()
            copied.synchronize()  # before the workers get the host's buffer back
    finally:
        with suppress(
            RuntimeError
        ):  # a fault comes out of every later call, too; here it would replace the error that ends this
            torch.cuda.synchronize(device)


def lock_pages(batch: Batch) -> list[Tensor]:
    """Locks the memory of a batch, so that the host need not wait for copies to a GPU; returns what `unlock_pages` is to unlock.

    Where the system refuses, a warning says so, once: copies out of pageable memory are as right, only slower.
    """
    locked: list[Tensor] = []

    def lock(tensor: Tensor) -> Tensor:
        torch.cuda.check_error(
            torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        )  # type: ignore[no-untyped-call]
        locked.append(tensor)
        return tensor

    try:
        batch.map(lock)
    except RuntimeError as error:
        _forget_error()
        _warn(str(error))
    return locked


def unlock_pages(locked: Iterable[Tensor]) -> None:
    """Undoes `lock_pages`; after a fault of the GPU, when this fails like every other call, quietly."""
    for tensor in locked:
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()))  # type: ignore[no-untyped-call]
        except RuntimeError:
            _forget_error()


def _forget_error() -> None:
    # CUDA keeps the error of a failed call until it is asked for; PyTorch asks after the next kernel, and blames that.
    with suppress(RuntimeError):
        torch.ones((), device="cuda")


@functools.cache  # every evaluation would say it again
def _warn(reason: str) -> None:
    log.warning(
        "cannot lock the pages of shared memory (%s): going on with slower copies to the GPU",
        reason,
    )
