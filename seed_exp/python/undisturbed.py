"""The state of a process that a call from Python leaves as it was."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import numpy as np
import torch

from seed_exp.base.redaction import printable_streams
from seed_exp.base.stopping import Stopped
from seed_exp.config.from_python import own_hydra


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts back what a command changes: logging, random states, environment, flags of CUDA, Hydra.

    The printed lines of a command go to stderr, as its log does: stdout is the caller's.

    Raises:
        ValueError: Hydra refused an option.
        KeyboardInterrupt: Ctrl-C, or a notebook's stop button, ended a training; with the folder in
            which the same call goes on.
    """
    with (
        _environment(),
        _logging(),
        _random_states(),
        _cuda(),
        own_hydra(),
        printable_streams(),
        redirect_stdout(sys.stderr),
    ):
        try:
            yield
        except Stopped as stopped:
            if stopped.signal_name != signal.SIGINT.name:
                raise
            raise KeyboardInterrupt(
                f"stopped after step {stopped.step}; the same call goes on in {stopped.folder}"
            ) from None


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _logging() -> Iterator[None]:
    loggers = [logging.getLogger(), logging.getLogger("seed_exp")]
    before = [(log, log.level, log.propagate, list(log.handlers)) for log in loggers]
    try:
        yield
    finally:
        for log, level, propagate, handlers in before:
            for handler in log.handlers:
                if handler not in handlers:
                    handler.close()
            log.handlers[:], log.propagate = handlers, propagate
            log.setLevel(level)


@contextmanager
def _random_states() -> Iterator[None]:
    plain, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if _uses_gpu() else []
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


@contextmanager
def _cuda() -> Iterator[None]:
    """Puts back the present GPU and whether TF32 is allowed, which `local_device` sets."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = matmul.allow_tf32, cudnn.allow_tf32
    gpu = torch.cuda.current_device() if _uses_gpu() else None
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = allowed
        if gpu is not None:
            torch.cuda.set_device(gpu)


def _uses_gpu() -> bool:
    """Whether the caller has used a GPU: to ask CUDA for its state would take memory there."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
