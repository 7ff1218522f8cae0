"""Makes an error of one rank the error of all.

Otherwise the others wait for that rank, and a launcher hears of rank 0's errors only.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from seed_exp.base.stopping import Stopped

PATIENCE_S = 10.0
"""Seconds that a rank may hang in a collective with one that has failed.

Rank 0 waits as long for the others to hear of an error.
"""
SILENCE_S = 40.0
"""Seconds without a sign of life after which a rank counts as dead."""
_LOOK_S = 0.5
_STOPPED = "stopped"


class SharedFailure:
    """Context of a process group's work: every rank raises the first error of any rank.

    Rank 0 is the last to leave. When a rank has ended, the others' collective fails, which is how
    they notice; a thread ends those that hang in it, as they may with NCCL. A rank that was killed
    says nothing, and where it had not connected yet, nothing fails. So each rank gives signs of
    life, and the rank before it listens.

    Args:
        store: Store of the rendezvous (torch.distributed.Store); rank 0's process may hold it.
        rank: Number of this process.
        world_size: Number of processes.
        leave: Leaves the process group.
    """

    def __init__(self, store: Any, rank: int, world_size: int, leave: Callable[[], None]) -> None:
        # A clone: a thread that waits for a key keeps all others from its store.
        self._store, self._rank, self._world_size, self._leave = (
            store.clone(),
            rank,
            world_size,
            leave,
        )
        self._ours = self._heard = ""
        self._looks = 0
        self._leaving, self._looked, self._left = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        self._watcher = threading.Thread(
            target=self._watch, daemon=True, name="seed_exp failure watch"
        )

    def __enter__(self) -> SharedFailure:
        self._watcher.start()
        with suppress(RuntimeError):  # `_look` will find that rank 0 has gone
            self._sign()
        threading.Thread(target=self._look, daemon=True, name="seed_exp failure look").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ours = (
            f"(rank {self._rank}): {_text(error)}"
            if isinstance(error, Exception)
            else _STOPPED
            if error
            else ""
        )
        first = self._publish(self._ours) if self._ours else ""
        self._mark("heard")
        self._leave()
        if self._rank == 0:
            self._wait_for("left" if first in ("", _STOPPED) else "heard")
            first = first or self._published()
        self._leaving.set()
        self._looked.wait(PATIENCE_S)
        self._mark("left")
        self._left.set()
        self._watcher.join()
        if first != self._ours:  # an error because another was leaving is none
            raise Stopped(signal.SIGTERM) if first == _STOPPED else ValueError(first) from None

    def _publish(self, ours: str) -> str:
        """The message of the first rank that left before the end."""
        try:
            return self._heard or str(self._store.compare_set("failure", "", ours).decode())
        except RuntimeError:  # rank 0 has gone, and the store with it
            return self._heard or ours

    def _published(self) -> str:
        return self._store.get("failure").decode() if self._store.check(["failure"]) else ""

    def _look(self) -> None:
        try:
            self._look_around()
        finally:
            self._looked.set()

    def _look_around(self) -> None:
        """Gives signs of life; looks for the next rank's and for errors, until there is one."""
        signs, silent, rank0_leaves = 0, 0, False
        after = (self._rank + 1) % self._world_size
        while not self._leaving.wait(_LOOK_S) and not self._heard:
            try:
                self._sign()
                before, signs = signs, self._store.add(f"alive {after}", 0)
                # Counted in looks, not by the clock: nobody was silent in a job that was suspended.
                silent = (
                    silent + 1
                    if signs == before > 0 and not self._store.check([f"heard {after}"])
                    else 0
                )
                if silent * _LOOK_S >= SILENCE_S:
                    self._publish(_silence(after))
                rank0_leaves = self._store.check(["heard 0"])
                self._heard = self._published()
                self._looks += 1
            except RuntimeError:  # the store has gone: with rank 0, where no launcher holds it
                if rank0_leaves:
                    return
                self._heard = _silence(0)
        if self._heard:
            self._mark("heard")

    def _watch(self) -> None:
        """Ends the process where it hangs.

        Does not use the store, which may be what hangs, when its machine has lost power.
        """
        looks, silent = 0, 0
        while not self._left.wait(_LOOK_S) and not self._heard:
            before, looks = looks, self._looks
            silent = silent + 1 if looks == before and not self._looked.is_set() else 0
            if silent * _LOOK_S >= SILENCE_S:
                self._heard = _silence(0)
        # Rank 0 first: when another one has gone, the launcher kills it before it could say why.
        patience = PATIENCE_S if self._rank == 0 else 1.5 * PATIENCE_S
        if self._heard not in ("", _STOPPED) and not self._left.wait(patience):
            error = self._heard if self._ours in ("", _STOPPED) else self._ours
            sys.stderr.write(f"error {error}\n")
            sys.stderr.flush()
            os._exit(1)

    def _sign(self) -> None:
        self._store.add(f"alive {self._rank}", 1)

    def _wait_for(self, mark: str) -> None:
        """Waits until all the others have set the mark, for a while."""
        end = time.monotonic() + PATIENCE_S / 2
        marks = [f"{mark} {rank}" for rank in range(1, self._world_size)]
        while not self._store.check(marks) and time.monotonic() < end:
            time.sleep(_LOOK_S / 10)

    def _mark(self, mark: str) -> None:
        with suppress(RuntimeError):  # rank 0 has gone
            self._store.set(f"{mark} {self._rank}", "")


def _silence(rank: int) -> str:
    return (
        f"rank {rank} has died without a word: it was killed, perhaps for memory, "
        "or its machine is gone; "
        "start the same command again, it goes on from the last checkpoint"
    )


def _text(error: BaseException) -> str:
    """The message of an error that a user can cause; the traceback of any other."""
    if isinstance(error, ValueError | OSError):
        return str(error)
    return "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
