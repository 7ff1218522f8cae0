"""Signals that ask a process to stop where it can go on: a scheduler's warnings."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

WARNINGS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
REQUEUE_STATUS = 75
"""Exit status of a run that was stopped by a scheduler's signal and goes on when it is started again (EX_TEMPFAIL)."""
INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C, as shells have it."""


class Stopped(SystemExit):
    """A signal has ended the run, and the disk holds all that it needs to go on.

    Args:
        number: The signal.
        folder, step: The run folder, and after which step it goes on there; None before training.
    """

    def __init__(self, number: int, folder: Path | None = None, step: int | None = None) -> None:
        super().__init__(INTERRUPTED_STATUS if number == signal.SIGINT else REQUEUE_STATUS)
        self.signal_name = signal.Signals(number).name
        self.folder, self.step = folder, step


@contextmanager
def stop_at_once() -> Iterator[None]:
    """While it is entered, a warning raises `Stopped` wherever the main thread is; `fit` replaces that while it trains."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python delivers no signals there
        yield
        return
    before = {number: signal.signal(number, raise_stopped) for number in WARNINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_stopped(number: int, _frame: FrameType | None) -> None:
    """A handler; it does nothing while the process is leaving because of an earlier warning, so that all gets closed."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    if error is None:
        raise Stopped(number)
