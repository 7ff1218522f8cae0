from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
import torch

from seed_exp.base.stopping import Stopped
from seed_exp.engine import failure
from seed_exp.engine.failure import SharedFailure


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "_LOOK_S", 0.02)


def ranks(*works: Callable[[threading.Event], None]) -> list[BaseException | None]:
    """The error that each rank ends with, or None.

    A rank that leaves sets the event, as its closed connections do for collectives.
    """
    store, torn = torch.distributed.HashStore(), threading.Event()
    ends: list[BaseException | None] = [None] * len(works)

    def run(rank: int) -> None:
        try:
            with SharedFailure(store, rank, len(works), torn.set):
                works[rank](torn)
        except BaseException as error:
            ends[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return ends


def works(torn: threading.Event) -> None:
    pass


def waits(torn: threading.Event) -> None:
    """Waits as in a collective with all other ranks."""
    assert torn.wait(10)
    raise RuntimeError("Connection closed by peer")


def fails(torn: threading.Event) -> None:
    raise ValueError("cannot decode image 'a.png'")


def breaks(torn: threading.Event) -> None:
    raise TypeError("a defect")


def stops(torn: threading.Event) -> None:
    raise Stopped(15)


def test_an_end_without_errors_is_none() -> None:
    assert ranks(works, works, works) == [None, None, None]


@pytest.mark.parametrize("order", [(fails, waits, waits), (waits, waits, fails)])
def test_the_first_error_is_that_of_every_rank(
    order: tuple[Callable[[threading.Event], None], ...],
) -> None:
    number = order.index(fails)
    ends = [str(end) for end in ranks(*order)]
    own = ends.pop(number)
    assert own == "cannot decode image 'a.png'"
    assert ends == [f"(rank {number}): {own}"] * 2


def test_a_defect_comes_with_its_traceback() -> None:
    first, second = ranks(waits, breaks)
    assert isinstance(second, TypeError)
    assert str(first).startswith("(rank 1): Traceback")
    assert 'raise TypeError("a defect")' in str(first)


def test_rank_0_hears_of_an_error_after_its_own_work() -> None:
    first, _ = ranks(works, fails)
    assert str(first) == "(rank 1): cannot decode image 'a.png'"


def test_ranks_that_others_leave_because_of_a_signal_stop_too() -> None:
    assert [type(end) for end in ranks(stops, waits)] == [Stopped, Stopped]
    assert [type(end) for end in ranks(waits, stops)] == [Stopped, Stopped]


def test_a_rank_that_hangs_is_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    freed = threading.Event()
    monkeypatch.setattr(failure, "PATIENCE_S", 0.2)
    monkeypatch.setattr(failure.os, "_exit", lambda status: freed.set())
    ranks(lambda _: freed.wait(10) and None, fails)
    assert freed.is_set()
    assert capsys.readouterr().err == "error (rank 1): cannot decode image 'a.png'\n"


def test_a_rank_that_has_left_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "SILENCE_S", 0.1)

    def long(torn: threading.Event) -> None:
        time.sleep(1)

    assert ranks(long, works, works) == ranks(works, works, long) == [None, None, None]


HANGS = """
import os, signal, sys, time
import torch
from torch import distributed as dist
from seed_exp.engine import distributed, failure

failure.SILENCE_S, failure.PATIENCE_S = 1.0, 0.5
with distributed.process_group(torch.device("cpu")):
    if sys.argv[1] == os.environ["RANK"]:
        time.sleep(1)
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    if os.environ["RANK"] == "0":
        dist.new_group(backend="gloo")  # waits for the other to come to the same line
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("dead", "signal"),  # SIGSTOP as if its machine had lost power: nothing is closed
    [
        (0, "SIGKILL"),
        (1, "SIGSTOP"),
        pytest.param(0, "SIGSTOP", marks=pytest.mark.slow),
        pytest.param(1, "SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_is_missed_by_one_that_hangs_outside_of_collectives(
    dead: int, signal: str, tmp_path: Path
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(probe.getsockname()[1]),
        }
    processes = [
        forks.Popen(
            [sys.executable, "hangs.py", str(dead), signal],
            cwd=tmp_path,
            env={**os.environ, **rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        _, printed = processes[1 - dead].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert f"error rank {dead} has died without a word" in printed
    assert [process.returncode for process in processes] == ([-9, 1] if dead == 0 else [1, -9])
