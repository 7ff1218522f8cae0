"""Times data-parallel training on this machine, and estimates it for clusters on paper."""

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
"""Numbers of GPUs for which the efficiency is estimated."""
PATIENCE_S = 600
"""Seconds that a process may take to build its networks, or to make a step."""


@dataclass(frozen=True)
class Step:
    """Costs of a training step of one process."""

    compute_s: float
    """Seconds that the step takes in a process on its own."""
    gradient_bytes: int
    """Bytes of the gradients of all students, float32."""
    queue_bytes: int
    """Bytes of the teacher embeddings that a process adds to the queues, float32."""


@dataclass(frozen=True)
class Interconnect:
    """The network between GPUs.

    The defaults are assumptions: nodes of 8 GPUs with NVLink, and 400 Gbit/s of InfiniBand per GPU
    between nodes.
    """

    gpus_per_node: int = 8
    """GPUs in a node."""
    node_bytes_per_s: float = 300e9
    """Bytes per second and GPU of a ring within a node."""
    cluster_bytes_per_s: float = 40e9
    """Bytes per second and GPU of a ring through several nodes."""
    latency_s: float = 10e-6
    """Seconds of one message; NCCL's trees send about 2 log2(GPUs) of them in succession."""
    backward_share: float = 0.4
    """Share of a step's time in which gradients can be sent while the backward pass goes on."""

    def transfer_s(self, num_bytes: float, gpus: int) -> float:
        """Returns the seconds to send `num_bytes` from each GPU to the next."""
        rate = self.node_bytes_per_s if gpus <= self.gpus_per_node else self.cluster_bytes_per_s
        return num_bytes / rate + 2 * math.log2(max(gpus, 2)) * self.latency_s


def efficiency(step: Step, network: Interconnect, gpus: int) -> float:
    """Estimates the rate of several GPUs, as a share of `gpus` times the rate of one.

    The batch size per GPU stays the same. From each of p GPUs, the all-reduce of the gradients
    sends 2 (p - 1) / p of their size, during the backward pass. The all-gather of the queue's new
    embeddings sends those of the p - 1 others, after the backward pass.

    Returns:
        From 0 to 1; 1 if communication costs no time.
    """
    if gpus == 1:
        return 1.0
    reduce_s = network.transfer_s(2 * (gpus - 1) / gpus * step.gradient_bytes, gpus)
    gather_s = network.transfer_s((gpus - 1) * step.queue_bytes, gpus)
    exposed_s = max(0.0, reduce_s - network.backward_share * step.compute_s)
    return step.compute_s / (step.compute_s + exposed_s + gather_s)


def bench(config: BenchConfig) -> BenchReport:
    """Measures images per second of one process, and of `config.processes` processes together.

    Each process has the same batch size.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    device, num = local_device(config.device), config.batch_size
    refuse_shared_gpus(device, config.processes)
    threads = config.threads or 1  # one process gets as many as each of several
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
        "each process sends per step": (
            f"2 (p - 1) / p x {gradients / 1e6:.3g} MB of gradients, and gets (p - 1) x "
            f"{queued / 1e6:.3g} MB for the queue"
        ),
    }
    facts |= {
        f"efficiency on {gpus} GPUs, on paper": _expected(step, gpus, config)
        for gpus in GPUS
        if device.type == "cuda"
    }
    return replace(report, facts=facts | machine(device))


def refuse_shared_gpus(device: torch.device, processes: int) -> None:
    """Checks that each process has a GPU of its own, where they train on GPUs.

    Raises:
        ValueError: there are fewer GPUs. NCCL does not join processes that share one.
    """
    if device.type == "cuda" and processes > (num := torch.cuda.device_count()):
        raise ValueError(
            f"bench=scaling measures one process per GPU; processes={processes}, and torch sees "
            f"{num} of them; choose a machine with {processes} GPUs, or device=cpu"
        )


def _expected(step: Step, gpus: int, config: BenchConfig) -> str:
    together, queue_size = gpus * config.batch_size, config.objective.queue_length
    full = (
        f"; {together} images per step fill the queue of {queue_size} at once"
        if together >= queue_size
        else ""
    )
    return f"{efficiency(step, Interconnect(), gpus):.2f}{full}"


class _Ranks:
    """Processes joined as torchrun joins them, each with its own training.

    They make a step together each time `step` is called.
    """

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
        """Makes one step in all processes."""
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
