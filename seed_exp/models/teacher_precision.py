"""Number format of a frozen teacher's forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from seed_exp.config.schema import Precision

log = logging.getLogger("seed_exp")


def teacher_dtype(students: torch.dtype, device_type: str) -> torch.dtype:
    """Format in which a teacher computes while its students compute in `students`.

    It is float16 where students have bfloat16 on a GPU: as fast, with an eighth of the rounding
    error. Inference needs no scaled gradients; `Overflow` watches float16's smaller range.
    Otherwise it is the students' format.
    """
    return torch.float16 if (students, device_type) == (torch.bfloat16, "cuda") else students


def torch_format(precision: Precision) -> torch.dtype:
    """float32 or bfloat16 as torch has it."""
    return {Precision.float32: torch.float32, Precision.bfloat16: torch.bfloat16}[precision]


def callers_dtype(device_type: str) -> torch.dtype:
    """Format of the autocast context that the caller is in; float32 outside of one."""
    if not torch.amp.is_autocast_available(device_type):  # "meta", for shapes only
        return torch.float32
    enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else torch.float32


def computing_in(dtype: torch.dtype, device_type: str) -> AbstractContextManager[object]:
    """Context in which networks compute in `dtype`, whatever the caller's autocast."""
    if dtype is callers_dtype(device_type):
        return nullcontext()
    half = dtype is not torch.float32
    return torch.autocast(device_type, dtype if half else None, enabled=half)


class Overflow:
    """Whether any of a teacher's embeddings was not finite, found out without waiting for a GPU.

    The answer lags: it is copied to the host while the GPU goes on, and read once it has arrived.
    Only the first embeddings of views of a shape are waited for, because a teacher that does not
    fit into float16 mostly shows it there.
    """

    def __init__(self) -> None:
        self._seen = False
        self._tried: set[torch.Size] = set()
        self._on_device: Tensor | None = None
        self._arriving: Arriving | None = None

    def __deepcopy__(self, memo: object) -> Overflow:
        return Overflow()  # an event of a GPU cannot be copied

    def seen(self) -> bool:
        """Whether an embedding is known to have been not finite; the first time it is logged."""
        if self._arriving is not None and self._arriving.is_there():
            self._note(bool(self._arriving.flag))
            self._arriving = None
        return self._seen

    def add(self, outputs: Sequence[Tensor], views: torch.Size) -> None:
        """Looks at what the teacher gave for views of this shape."""
        found = ~torch.stack([output.isfinite().all() for output in outputs]).all()
        if views not in self._tried:
            self._tried.add(views)
            self._note(bool(found))
            return
        # What is found while an answer is under way goes with the next one.
        self._on_device = found if self._on_device is None else self._on_device | found
        if self._arriving is None:
            self._arriving = sent_to_host(self._on_device)

    def _note(self, found: bool) -> None:
        if found and not self._seen:
            log.warning(
                "an embedding of the teacher is not finite in float16; "
                "the teacher computes in float32 from now on"
            )
        self._seen = self._seen or found


class Arriving(NamedTuple):
    """A flag on its way to the host."""

    flag: Tensor
    """bool [], valid once it is there."""
    is_there: Callable[[], bool]
    """Whether it has arrived; does not wait."""


def sent_to_host(flag: Tensor) -> Arriving:
    """The flag (bool []) on its way to the host."""
    if not flag.is_cuda:
        return Arriving(flag, lambda: True)
    on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
    on_host.copy_(flag, non_blocking=True)
    arrival = torch.cuda.Event()  # type: ignore[no-untyped-call,unused-ignore]
    arrival.record()
    return Arriving(on_host, arrival.query)
