"""Functions run in several processes at once, joined as torchrun joins them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import forks
import torch

from seed_exp.engine.distributed import process_group

PATIENCE_S = 120


def other_children() -> list[multiprocessing.process.BaseProcess]:
    """Child processes of this one, without those of `Ranks`, which outlive a test."""
    return multiprocessing.active_children()


class Ranks:
    """`world_size` gloo processes that wait for functions to run.

    They start once, because importing torch takes seconds.
    """

    def __init__(self, world_size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = multiprocessing.Pipe()
            key = bytes(multiprocessing.current_process().authkey)  # tensors come with it
            code = f"import ranks; ranks.serve({rank}, {world_size}, {port}, {key!r})"
            command = [sys.executable, "-c", code]
            self._processes.append(forks.Popen(command, stdin=theirs.fileno()))
            theirs.close()
            self._connections.append(ours)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of `function(*args)`, one per rank; the function must be importable."""
        for connection in self._connections:
            connection.send((sys.path, pickle.dumps((function, args))))
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(PATIENCE_S):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer")
            error, result = connection.recv()
            if error:
                self.close()
                raise RuntimeError(f"rank {rank}: {error}")
            results.append(result)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def serve(rank: int, world_size: int, port: int, key: bytes) -> None:
    """Runs functions that come through standard input, until it is closed."""
    multiprocessing.current_process().authkey = key
    connection = Connection(os.dup(0))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        while True:
            try:
                sys.path[:], payload = connection.recv()
            except EOFError:
                return
            try:
                function, args = pickle.loads(payload)
                connection.send((None, function(*args)))
            except Exception:
                connection.send((traceback.format_exc(), None))
