from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

from seed_exp.engine.checkpoint import load_checkpoint, save_checkpoint
from seed_exp.files import atomic_write


def state(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((300,), 1.0 + step), "optimizers": {"a": {"state": {0: torch.zeros(2)}}}}


def save(folder: Path, *steps: int) -> list[Path]:
    for step in steps:
        save_checkpoint(folder, step, state(step))
    return files(folder)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").iterdir())


def step_of(folder: Path) -> int:
    loaded = load_checkpoint(folder)
    assert loaded is not None
    assert torch.equal(loaded["weights"], state(loaded["step"])["weights"])
    return int(loaded["step"])


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert [path.name for path in save(tmp_path, 5, 10, 100, 20000)] == ["step_00000100.pt", "step_00020000.pt"]
    assert step_of(tmp_path) == 20000


def test_more_digits_than_the_name_has_room_for_stay_in_order(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999, 100_000_000, 100_000_001)
    assert step_of(tmp_path) == 100_000_001
    assert len(files(tmp_path)) == 2


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None


def test_other_files_there_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    strangers = {tmp_path / "checkpoints" / name for name in ("step_best.pt", "step_00000009.pt.bak", ".step_00000009.pt.x.tmp")}
    for path in strangers:
        path.write_text("mine")
    assert load_checkpoint(tmp_path) is None
    save(tmp_path, 1, 2, 3)
    assert strangers < set(files(tmp_path))
    assert step_of(tmp_path) == 3


def zero_a_weight(content: bytes) -> bytes:
    position = content.index(torch.full((20,), 3.0).numpy().tobytes())  # among the weights of step 2
    return content[: position + 8] + bytes(64) + content[position + 72 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "a byte missing": lambda content: content[:-1],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"not a checkpoint\n" * 100,
    "garbage": lambda content: random.Random(0).randbytes(1000),
    "garbage of another kind": lambda content: random.Random(3).randbytes(50),
    "legacy pickle cut off": lambda content: pickle.dumps({"step": 2}, protocol=2)[:-3],
    "a block of zeros among the weights": zero_a_weight,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before(damage: str, tmp_path: Path, logged: list[str]) -> None:
    newest = save(tmp_path, 1, 2)[-1]
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    assert step_of(tmp_path) == 1
    assert [line for line in logged if line.startswith(f"WARNING checkpoint {newest} is damaged")]


def test_any_bytes_either_load_as_they_were_saved_or_fall_back(tmp_path: Path) -> None:
    newest = save(tmp_path, 1, 2)[-1]
    content = newest.read_bytes()
    dice = random.Random(0)
    for _ in range(150):
        start, length = dice.randrange(len(content)), dice.choice([1, 3, 40, 600])
        patch = dice.choice([bytes(length), dice.randbytes(length), b""])
        newest.write_bytes(content[:start] + patch + content[start + length :])
        assert step_of(tmp_path) in (1, 2)


def test_when_all_are_damaged_the_run_does_not_silently_start_anew(tmp_path: Path) -> None:
    for path in save(tmp_path, 1, 2):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .*checkpoints can be read; remove them to start anew"):
        load_checkpoint(tmp_path)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, logged: list[str]) -> None:
    trap = tmp_path / "executed"
    _, newest = save(tmp_path, 1, 2)
    torch.save({**state(2), "trap": Trap(trap)}, newest)
    assert step_of(tmp_path) == 1
    assert not trap.exists()
    assert any("damaged" in line for line in logged)
    torch.load(newest, weights_only=False)
    assert trap.exists(), "the trap works when code is allowed"


def test_an_interrupted_write_leaves_the_old_checkpoint_and_no_rest(tmp_path: Path) -> None:
    old = save(tmp_path, 1)
    for path in (tmp_path / "checkpoints" / "step_00000002.pt", old[0]):
        with pytest.raises(KeyboardInterrupt):
            write_half(path)
        assert files(tmp_path) == old
    assert step_of(tmp_path) == 1


def write_half(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt


def save_own(folder: str) -> None:
    import torch.distributed as dist

    save_checkpoint(Path(folder), dist.get_rank(), state(dist.get_rank()))
    dist.barrier()


def test_only_rank_0_writes(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(save_own, str(tmp_path))
    assert [path.name for path in files(tmp_path)] == ["step_00000000.pt"]
