from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn

from seed_exp.engine import distributed


def test_one_process_is_its_own_world() -> None:
    tensor = torch.arange(3.0)
    with distributed.process_group(torch.device("cpu")):
        assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size(), distributed.local_world_size()) == (
        0,
        1,
        1,
    )
    assert distributed.all_gather(tensor) is tensor
    assert distributed.mean(tensor) is tensor
    module = nn.Linear(1, 1)
    assert distributed.replicate(module, torch.device("cpu")) is module
    with distributed.rank0_first():
        pass
    with distributed.no_sync(module, skip=True):
        pass


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.local_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device=gpu is unknown; use auto, cpu or cuda"):
        distributed.local_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.local_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda, but torch sees no GPU"):
        distributed.local_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert (
        distributed.local_device("auto")
        == distributed.local_device("cuda")
        == torch.device("cuda", 3)
    )
    assert chosen == [torch.device("cuda", 3)] * 2
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setattr(
        torch.cuda, "device_count", lambda: 1
    )  # a scheduler shows each process its own
    assert distributed.local_device("auto") == torch.device("cuda", 0)


def facts() -> dict[str, Any]:
    rank = distributed.rank()
    mine = torch.full((2, 3), float(rank))
    statistics = nn.BatchNorm1d(2)
    statistics.running_mean.fill_(rank + 1)
    distributed.broadcast_buffers(statistics)
    return {
        "rank": rank,
        "world_size": distributed.world_size(),
        "local_world_size": distributed.local_world_size(),
        "gathered": distributed.all_gather(mine),
        "transposed": distributed.all_gather(torch.arange(6.0).view(2, 3).T + rank),
        "mean": distributed.mean(torch.tensor([2.0 * rank, 1.0])),
        "statistics": statistics.running_mean,
        "requires_grad": distributed.all_gather(nn.Parameter(mine)).requires_grad,
    }


def test_collectives_of_two_processes(two_ranks: Ranks) -> None:
    expected = torch.tensor([[0.0] * 3] * 2 + [[1.0] * 3] * 2)
    columns = torch.arange(6.0).view(2, 3).T
    for rank, found in enumerate(two_ranks.run(facts)):
        assert (found["rank"], found["world_size"], found["local_world_size"]) == (rank, 2, 2)
        assert torch.equal(found["gathered"], expected)
        assert torch.equal(found["transposed"], torch.cat([columns, columns + 1]))
        assert torch.equal(found["mean"], torch.tensor([1.0, 1.0]))
        assert torch.equal(found["statistics"], torch.ones(2))
        assert not found["requires_grad"]


def in_turn(file: str) -> bool:
    """Whether rank 1 finds what rank 0 made."""
    path = Path(file)
    with distributed.rank0_first():
        found = path.exists()
        if distributed.rank() == 0:
            path.write_text("made")
    return found


def test_rank_0_goes_first(two_ranks: Ranks, tmp_path: Path) -> None:
    for attempt in range(5):
        assert two_ranks.run(in_turn, str(tmp_path / str(attempt))) == [False, True]


def gradients(skip: bool) -> Tensor:
    module = nn.Linear(2, 1, bias=False)
    network = distributed.replicate(module, torch.device("cpu"))
    images = torch.full((1, 2), distributed.rank() + 1.0)
    with distributed.no_sync(network, skip):
        network(images).sum().backward()
    assert module.weight.grad is not None
    return module.weight.grad.clone()


def test_gradients_are_averaged_unless_skipped(two_ranks: Ranks) -> None:
    assert [grad.tolist() for grad in two_ranks.run(gradients, False)] == [
        [[1.5, 1.5]],
        [[1.5, 1.5]],
    ]
    assert [grad.tolist() for grad in two_ranks.run(gradients, True)] == [
        [[1.0, 1.0]],
        [[2.0, 2.0]],
    ]


def statistics() -> tuple[Tensor, Tensor]:
    """Running means on the same images: of a replicated network, and of one of this rank alone."""
    module, alone = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    network = distributed.replicate(module, torch.device("cpu"))
    for resolution in (1.0, 2.0):  # two forward passes in one step, as with multi-crop
        images = torch.tensor([[0.0, 0.0], [2.0, 4.0]]) * resolution + distributed.rank()
        alone(images)
        output = network(images)
    output.sum().backward()
    return module.running_mean, alone.running_mean


def test_statistics_stay_each_processes_own_during_training(two_ranks: Ranks) -> None:
    for found, own in two_ranks.run(statistics):
        assert torch.equal(found, own)


def votes() -> list[int]:
    vote, rank = distributed.Vote(), distributed.rank()
    return [vote.highest(number) for number in (0, 15 * rank, 0, 12 - rank, 0)]


def test_all_ranks_hear_of_the_largest_number_at_the_same_call(two_ranks: Ranks) -> None:
    assert two_ranks.run(votes) == [[0, 0, 15, 0, 12]] * 2
