"""Several processes of one run: they read the same files, and go on at the same step."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import torch
from ranks import Ranks

from seed_exp.config.compose import compose
from seed_exp.engine import checkpoint, distributed, memory
from seed_exp.engine.fleet import find_batch_size
from seed_exp.methods.moco import Moco
from seed_exp.models.student_header import read_header
from seed_exp.training import encoders, monitor, pretraining
from seed_exp.training.encoders import build_students
from seed_exp.views.recipe import TrainViews

OPTIONS = [
    "data=digits",
    "views=digits",
    "views.crops.global.num=2",
    "student=convnet_w2",
    "moco.queue_size=64",
    "device=cpu",
]
OPTIONS += [
    "data.num_workers=0",
    "tracker=files",
    "batch_size=32",
    "steps=4",
    "checkpoint_every=2",
    "eval_every=0",
]
OPTIONS += ["knn_bank_size=50", "knn_query_size=50", "optimizer.warmup_epochs=0"]


def train(folder: str) -> list[int]:
    """The steps of the students that this rank finds when training has ended."""
    found: list[int] = []

    def read(*_: Any) -> None:
        header = read_header(Path(folder) / "students" / "convnet_w2.safetensors")
        found.append(-1 if header is None else header["step"])

    evaluate, encoders.run_evaluations = encoders.run_evaluations, read
    try:
        pretraining.pretrain(compose("pretrain", [*OPTIONS, f"run_dir={folder}"]))
    finally:
        encoders.run_evaluations = evaluate
    return found


def train_while_rank_0_is_slow(folder: str) -> list[int]:
    """As `train`; to write a student, and to measure one, takes longer than a collective may."""
    save, measure = encoders.save_student, monitor.knn_accuracy

    def slow_save(*args: Any) -> None:
        if args[3]["step"] == 4:  # the last one
            time.sleep(3)
        save(*args)

    def slow_measure(*args: Any, **named: Any) -> dict[str, float]:
        time.sleep(3)
        return measure(*args, **named)

    encoders.save_student, monitor.knn_accuracy = slow_save, slow_measure
    torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))
    try:
        return train(folder)
    finally:
        encoders.save_student, monitor.knn_accuracy = save, measure
        torch.distributed.distributed_c10d._set_pg_timeout(distributed.TIMEOUT)


def test_the_ranks_wait_for_what_rank_0_does_alone_longer_than_for_a_collective(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    """What follows the training finds the last students on every rank."""
    assert two_ranks.run(train_while_rank_0_is_slow, str(tmp_path / "run")) == [[4], [4]]


def train_where_one_cannot_read(folder: str) -> str:
    read = checkpoint._read

    def unreadable(path: Path) -> dict[str, Any]:
        if distributed.rank() == 1 and path.name == "step_00000004.pt":
            raise ValueError("damaged, as this rank sees it")
        return read(path)

    checkpoint._read = unreadable
    try:
        train(folder)
    except ValueError as error:
        return str(error)
    finally:
        checkpoint._read = read
    return "trained"


def test_ranks_that_would_go_on_at_different_steps_do_not(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(train, str(tmp_path / "run"))
    for message in two_ranks.run(train_where_one_cannot_read, str(tmp_path / "run")):
        assert "not every process can read the newest checkpoint" in message
        assert "they would go on after steps [4, 2]" in message


def batch_size() -> int:
    """The batch size found where rank 1 has memory for one step of the smallest size only.

    The ranks take that size together.
    """
    config = compose("pretrain", [*OPTIONS, "batch_size=auto", "steps=null"])
    method = Moco(build_students(config, config.embedding_dim), config.moco, 0)
    available = memory.available_memory
    memory.available_memory = lambda device: 10**12 if distributed.rank() == 0 else 10**6
    try:
        return find_batch_size(
            method, TrainViews(config.views, 0), config, distributed.local_device("cpu"), 1437
        )
    finally:
        memory.available_memory = available


def test_the_batch_is_that_of_the_rank_with_the_least_memory(two_ranks: Ranks) -> None:
    (first, second) = two_ranks.run(batch_size)
    assert first == second
    assert first == 16
