"""How far a run is and how fast: a bar on a terminal, plain lines in the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from tqdm import tqdm

from seed_exp.engine import distributed

log = logging.getLogger("seed_exp")

FIRST_ESTIMATE_S = 10
"""Seconds of training after which the time left is estimated if no line has been logged."""


class Progress:
    """Measures and shows the speed of a run.

    Args:
        first_step: Number of steps done before.
        num_steps: Number of steps in all.
        batch_size: Images per step over all processes.
    """

    def __init__(self, first_step: int, num_steps: int, batch_size: int) -> None:
        self._num_steps, self._batch_size = num_steps, batch_size
        self._on_terminal = sys.stderr.isatty() and distributed.rank() == 0
        self._bar = tqdm(
            total=num_steps, initial=first_step, unit="step", disable=not self._on_terminal
        )
        self._waited = 0.0
        self._began, self._step_then = time.perf_counter(), first_step
        # Behind the first step, which may compile.
        self._warm: tuple[float, int] | None = None
        self._step, self._estimated = first_step, False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context of code that waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context of what is not training (evaluation, checkpoints), left out of the rate."""
        began = time.perf_counter()
        yield
        paused = time.perf_counter() - began
        self._began += paused
        if self._warm is not None:
            self._warm = self._warm[0] + paused, self._warm[1]

    def update(self) -> None:
        """Counts one step; after about 10 s logs the time left, unless `report` has."""
        self._bar.update()
        self._step += 1
        now = time.perf_counter()
        if self._warm is None:
            self._warm = now, self._step
        elif not self._estimated and now - self._began >= FIRST_ESTIMATE_S:
            began, step = self._warm
            rate = (self._step - step) * self._batch_size / max(now - began, 1e-9)
            self._log(self._step, "", rate)

    def measure(self, step: int) -> dict[str, float]:
        """Images per second over all processes, and percent of the time in `waiting`.

        Both since the last call; on a GPU also the most memory that tensors took so far, in GiB.
        """
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rate = (step - self._step_then) * self._batch_size / seconds
        share = 100 * self._waited / seconds
        self._began, self._step_then, self._waited = time.perf_counter(), step, 0.0
        speed = {"images_per_s": rate, "data_wait_percent": share}
        if torch.cuda.is_available() and torch.cuda.memory_allocated():
            speed["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return speed

    def report(self, step: int, losses: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Logs one line: step, losses, speed, time left."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        rate, share = speed["images_per_s"], speed["data_wait_percent"]
        self._bar.set_postfix_str(f"{shown}; {_per_second(rate)}")
        self._log(step, f"{shown}; ", rate, f", data wait {share:.0f} %")

    def _log(self, step: int, losses: str, rate: float, waiting: str = "") -> None:
        self._estimated = True
        seconds_left = (self._num_steps - step) * self._batch_size / max(rate, 1e-9)
        line = f"step {step}/{self._num_steps}: {losses}{_per_second(rate)}{waiting}"
        line += f", {_clock(seconds_left)} left"
        log.log(logging.DEBUG if self._on_terminal else logging.INFO, line)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def _per_second(rate: float) -> str:
    return f"{rate:.{0 if rate >= 10 else 1}f} img/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
