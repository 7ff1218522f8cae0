"""Signals that ask a run to stop where it can go on: a scheduler's warnings and Ctrl-C."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType

from seed_exp.engine import distributed

log = logging.getLogger("seed_exp")

REQUEUE_STATUS = 75
"""Exit status of a run that was stopped by a scheduler's signal and goes on when it is started again (EX_TEMPFAIL)."""
INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C, as shells have it."""
_WARNINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class StopRequest:
    """While it is entered, SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C are noted; a second Ctrl-C ends the process as usual.

    Outside the main thread, where Python delivers no signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal that arrived in this process."""
        self._interrupts = 0
        self._vote = distributed.Vote()
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (*_WARNINGS, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> bool:
        """Whether to stop now: the same answer on every rank, one step after the first of them has got a signal.

        To be called once in each step.
        """
        return self._vote.any(self.received is not None)

    def status(self) -> int:
        """What the process should exit with."""
        return INTERRUPTED_STATUS if self.received == signal.SIGINT else REQUEUE_STATUS

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                signal.default_int_handler(number, frame)
            log.warning("stopping after this step, with a checkpoint; Ctrl-C again ends at once")
        self.received = number if self.received is None else self.received
