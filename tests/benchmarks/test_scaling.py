from __future__ import annotations

import pytest
import torch

from seed_exp.benchmarks.bench_scaling import Interconnect, Step, efficiency, refuse_shared_gpus

FAST = Interconnect(
    gpus_per_node=8,
    node_bytes_per_s=1e9,
    cluster_bytes_per_s=1e8,
    latency_s=0.0,
    backward_share=0.5,
)


def test_what_hides_behind_the_backward_pass_costs_nothing() -> None:
    # 8 GPUs send 2 x 7/8 x 200 MB in 0.35 s; the backward pass takes 0.5 s.
    assert efficiency(Step(1.0, 200_000_000, 0), FAST, 8) == 1


def test_what_does_not_hide_and_the_queue_are_waited_for() -> None:
    # 2 x 7/8 x 400 MB take 0.7 s, 0.2 s longer than the backward pass;
    # 7 x 10 MB for the queue take 0.07 s.
    assert efficiency(Step(1.0, 400_000_000, 10_000_000), FAST, 8) == pytest.approx(1 / 1.27)


def test_between_nodes_the_slower_network_counts() -> None:
    # 16 GPUs: 2 x 15/16 x 40 MB over 100 MB/s take 0.75 s, 15 x 1 MB take 0.15 s.
    assert efficiency(Step(1.0, 40_000_000, 1_000_000), FAST, 16) == pytest.approx(
        1 / (1 + 0.25 + 0.15)
    )


def test_one_gpu_talks_to_nobody_and_messages_cost_their_latency() -> None:
    step = Step(1.0, 0, 0)
    assert efficiency(step, FAST, 1) == 1
    slow = Interconnect(latency_s=0.01, backward_share=0.0)
    assert efficiency(step, slow, 8) == pytest.approx(
        1 / (1 + 2 * 6 * 0.01)
    )  # 2 log2(8) messages for each of two collectives


def test_the_share_falls_with_the_number_of_gpus() -> None:
    step = Step(0.02, 46_800_000, 131_072)
    shares = [efficiency(step, Interconnect(), gpus) for gpus in (1, 2, 8, 16, 64, 512, 4096)]
    assert shares == sorted(shares, reverse=True)


def test_processes_that_would_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refuse_shared_gpus(torch.device("cpu"), 2)
    refuse_shared_gpus(torch.device("cuda", 0), 1)
    with pytest.raises(ValueError, match="processes=2, and torch sees 1 of them"):
        refuse_shared_gpus(torch.device("cuda", 0), 2)
