"""Data-parallel training: measured on the processes of this machine, and on paper for clusters."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch

from seed_exp.benchmarks.bench_step import TimedStep
from seed_exp.benchmarks.measure import BenchReport, Contender, interleave, machine
from seed_exp.config.schema import BenchConfig
from seed_exp.engine.distributed import local_device, process_group

GPUS = (8, 64, 512)
"""Of which the model speaks."""
PATIENCE_S = 600
"""How long a process may take to build its networks, or for a step."""


@dataclass(frozen=True)
class Step:
    """What a training step of one process computes and says to the others."""

    compute_s: float
    """Time of the step where nobody listens."""
    gradient_bytes: int
    """Gradients of all students, float32."""
    queue_bytes: int
    """Teacher embeddings that a process adds to the queues, float32."""


@dataclass(frozen=True)
class Interconnect:
    """What connects GPUs. The defaults are assumptions: an 8-GPU NVLink node, 400 Gbit/s of InfiniBand per GPU between nodes."""

    gpus_per_node: int = 8
    node_bytes_per_s: float = 300e9
    """Of a ring within a node, per GPU."""
    cluster_bytes_per_s: float = 40e9
    """Of a ring through several nodes, per GPU."""
    latency_s: float = 10e-6
    """Of one message; NCCL's trees need about 2 log2 of the number of GPUs in succession."""
    backward_share: float = 0.4
    """Of the step's time: while it lasts, gradients that are there already are sent."""

    def transfer_s(self, num_bytes: float, gpus: int) -> float:
        """Time to send so many bytes from each GPU to the next."""
        rate = self.node_bytes_per_s if gpus <= self.gpus_per_node else self.cluster_bytes_per_s
        return num_bytes / rate + 2 * math.log2(max(gpus, 2)) * self.latency_s


def efficiency(step: Step, network: Interconnect, gpus: int) -> float:
    """Share of `gpus` times one GPU's rate that so many reach at the same batch size per GPU: 1 where talking costs nothing.

    The gradients' all-reduce sends 2 (p - 1) / p of their size from each of p GPUs, beside the backward pass; the all-gather of
    the queue's new embeddings sends what p - 1 others give, after it, when nothing is left to hide behind.
    """
    if gpus == 1:
        return 1.0
    reduce_s = network.transfer_s(2 * (gpus - 1) / gpus * step.gradient_bytes, gpus)
    gather_s = network.transfer_s((gpus - 1) * step.queue_bytes, gpus)
    exposed_s = max(0.0, reduce_s - network.backward_share * step.compute_s)
    return step.compute_s / (step.compute_s + exposed_s + gather_s)


def bench(config: BenchConfig) -> BenchReport:
    """Images per second of one process and of `config.processes` together, with the same batch for each."""
    device, num = local_device(config.device), config.batch_size
    threads = config.threads or 1  # as many for one process as for each of several
    torch.set_num_threads(threads)
    with _Ranks(config, threads) as ranks:
        training = TimedStep(config)
        ways = [
            Contender("one process", training.ours(config.students), num),
            Contender(f"{config.processes} processes", ranks.step, num * config.processes),
        ]
        rows = interleave(ways, seconds=config.seconds, device=device)
        gradients = 4 * sum(
            parameter.numel()
            for student in training.students.values()
            for parameter in student.parameters()
        )
        queued = 4 * training.teacher.embedding_dim * num * len(training.images)
    step = Step(rows[0].median_s, gradients, queued)
    report = BenchReport("training step in parallel", "img/s", rows, "one process", [], {})
    measured = (
        f"{report.ratio(rows[1]) / config.processes:.2f} of {config.processes} times one process"
    )
    facts = {
        "students": ", ".join(config.students),
        **training.facts(),
        "threads": f"{threads} per process",
        "efficiency, measured": measured,
        "each process sends per step": f"2 (p - 1) / p x {gradients / 1e6:.3g} MB of gradients, and gets (p - 1) x "
        f"{queued / 1e6:.3g} MB for the queue",
    }
    facts |= {
        f"efficiency on {gpus} GPUs, on paper": _expected(step, gpus, config)
        for gpus in GPUS
        if device.type == "cuda"
    }
    return replace(report, facts=facts | machine(device))


def _expected(step: Step, gpus: int, config: BenchConfig) -> str:
    together, queue_size = gpus * config.batch_size, config.objective.queue_size
    full = (
        f"; {together} images per step fill the queue of {queue_size} at once"
        if together >= queue_size
        else ""
    )
    return f"{efficiency(step, Interconnect(), gpus):.2f}{full}"


class _Ranks:
    """Processes joined as torchrun joins them, each with its own training; they take a step together when asked."""

    def __init__(self, config: BenchConfig, threads: int) -> None:
        self._config, self._threads = config, threads
        self._connections: list[Connection] = []
        self._stack = ExitStack()

    def __enter__(self) -> _Ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self._config.processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, self._config, rank, port, self._threads), daemon=True
            )
            process.start()
            theirs.close()
            self._stack.callback(process.join)
            self._stack.callback(process.kill)
            self._connections.append(ours)
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self) -> None:
        """One step in all of them."""
        for connection in self._connections:
            connection.send(None)
        self._wait()

    def _wait(self) -> None:
        for rank, connection in enumerate(self._connections):
            if not connection.poll(PATIENCE_S):
                raise TimeoutError(
                    f"process {rank} of bench=scaling did not answer for {PATIENCE_S} s"
                )
            connection.recv()


def _serve(connection: Connection, config: BenchConfig, rank: int, port: int, threads: int) -> None:
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": config.processes,
        "LOCAL_WORLD_SIZE": config.processes,
    }
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(threads)
    device = local_device(config.device)
    with process_group(device):
        step = TimedStep(config).ours(config.students)
        while True:
            connection.send(None)
            connection.recv()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
