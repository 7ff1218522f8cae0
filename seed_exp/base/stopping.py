"""A scheduler's warning signals: they ask a process to stop at a point from which it can resume."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

WARNINGS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
REQUEUE_STATUS = 75
"""Exit status (EX_TEMPFAIL) of a run that a scheduler's signal stopped; a new start resumes it."""
INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C, the same as in shells."""


INTERRUPTED = "interrupted"
"""The line with which a command ends after Ctrl-C."""


def show_interrupt_in_one_line(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """An excepthook that shows no traceback for Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


class Stopped(SystemExit):
    """A signal has ended the run; everything needed to resume it is on disk.

    Args:
        number: The signal's number.
        folder: The run folder; None before training.
        step: The last step that is saved there; None before training.
    """

    def __init__(self, number: int, folder: Path | None = None, step: int | None = None) -> None:
        super().__init__(INTERRUPTED_STATUS if number == signal.SIGINT else REQUEUE_STATUS)
        self.signal_name = signal.Signals(number).name
        self.folder, self.step = folder, step


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Makes a warning signal raise `Stopped` in the main thread while the block runs.

    `fit` installs its own handlers while it trains.
    """
    # Python delivers signals to the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, raise_stopped) for number in WARNINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_stopped(number: int, _frame: FrameType | None) -> None:
    """Signal handler: raises `Stopped`, unless an earlier one is already unwinding."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    if error is None:
        raise Stopped(number)
