"""Signals that ask a training to stop where it can resume: a scheduler's warnings and Ctrl-C."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from seed_exp.base.stopping import WARNINGS, raise_stopped
from seed_exp.engine import distributed

log = logging.getLogger("seed_exp")


class StopRequest:
    """Context that notes SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C.

    A second Ctrl-C ends the process as usual. Outside the main thread, where Python delivers no
    signals, nothing is noted.
    """

    def __init__(self) -> None:
        self.received = 0
        """The first signal that arrived in this process; 0 = none."""
        self._interrupts = 0
        self._at_once = False
        self._vote = distributed.Vote()
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note) for number in (*WARNINGS, signal.SIGINT)
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed_signal(self) -> int:
        """The signal for which to stop now, the same on every rank; 0 = none.

        It is known one step after the first rank has got it. To be called once in each step.
        """
        return self._vote.highest(self.received)

    @contextmanager
    def raising_at_once(self) -> Iterator[None]:
        """Context in which a scheduler's warning raises `Stopped` at once.

        For work that may take longer than the scheduler waits, and that leaves nothing behind.
        """
        self._at_once = True
        try:
            if self.received in WARNINGS:
                raise_stopped(self.received, None)
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                signal.default_int_handler(number, frame)
            log.warning("stopping after this step, with a checkpoint; Ctrl-C again ends at once")
        self.received = self.received or number
        if self._at_once and number in WARNINGS:
            raise_stopped(number, frame)
