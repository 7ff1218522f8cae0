from __future__ import annotations

import errno
import pickle
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import fill
from ranks import Ranks

from seed_exp.base.files import atomic_write
from seed_exp.engine import checkpoint
from seed_exp.engine.checkpoint import CheckpointWriter, load_checkpoint


def state(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "weights": torch.full((300,), 1.0 + step),
        "optimizers": {"a": {"state": {0: torch.zeros(2)}}},
    }


def save(folder: Path, *steps: int, kept: tuple[int, ...] = ()) -> list[Path]:
    writer = CheckpointWriter(folder, keep=kept.__contains__, before_write=lambda _: None)
    for step in steps:
        writer.submit(state(step))
    writer.close(finished=True)
    return files(folder)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").iterdir())


def step_of(folder: Path) -> int:
    loaded = load_checkpoint(folder)
    assert loaded is not None
    assert torch.equal(loaded["weights"], state(loaded["step"])["weights"])
    return int(loaded["step"])


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert [path.name for path in save(tmp_path, 5, 10, 100, 20000)] == [
        "step_00000100.pt",
        "step_00020000.pt",
    ]
    assert step_of(tmp_path) == 20000


def test_those_to_be_kept_stay_beside_the_newest_two_others(tmp_path: Path) -> None:
    names = [path.name for path in save(tmp_path, 1, 2, 3, 4, 5, 6, 7, kept=(2, 6))]
    assert names == [f"step_{step:08d}.pt" for step in (2, 5, 6, 7)]


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tmp_path: Path,
) -> None:
    release = threading.Event()
    writer = CheckpointWriter(
        tmp_path, keep=lambda _: False, before_write=lambda _: release.wait(30) and None
    )
    live = state(1)
    writer.submit(live)
    assert load_checkpoint(tmp_path) is None
    live["weights"].fill_(-1)
    live["optimizers"]["a"]["state"][0] += 7
    release.set()
    writer.close(finished=True)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert step_of(tmp_path) == 1
    assert not loaded["optimizers"]["a"]["state"][0].any()


def large(step: int, shape: str) -> dict[str, Any]:
    """A state of nearly 3 MB; with one more the disk is full."""
    if shape == "one large tensor":
        return {"step": step, "weights": torch.full((700_000,), 1.0 + step)}
    return {"step": step, **{str(part): torch.full((500,), 1.0 + step) for part in range(1200)}}


@pytest.mark.parametrize("shape", ["one large tensor", "many small tensors"])
def test_a_full_disk_costs_a_checkpoint_and_leaves_the_old_one(
    shape: str, small_disk: Path, logged: list[str]
) -> None:
    writer = CheckpointWriter(small_disk, keep=lambda _: False, before_write=lambda _: None)
    writer.submit(large(1, shape))
    writer.submit(large(2, shape))  # the disk has no room for it beside the first one
    writer.submit(state(3))
    writer.close(finished=True)
    lost = [line for line in logged if "WARNING could not write the checkpoint of step 2" in line]
    assert len(lost) == 1
    assert re.search(r"\[Errno 28\] No space .*step_00000002\.pt'\); training goes on", lost[0])
    names = [path.name for path in files(small_disk)]
    assert names == ["step_00000001.pt", "step_00000003.pt"], "no rest of the second"
    assert step_of(small_disk) == 3


def test_the_last_checkpoint_is_tried_again_and_an_error_if_there_is_no_room_for_it(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setattr(checkpoint, "PAUSE_S", 0.3)
    ballast = fill(small_disk)
    threading.Timer(0.45, ballast.unlink).start()
    assert save(small_disk, 2)
    assert sum("; trying again in 0.3 s" in line for line in logged) == 2
    assert step_of(small_disk) == 2
    monkeypatch.setattr(checkpoint, "PAUSE_S", 0.01)
    fill(small_disk)
    with pytest.raises(OSError, match=r"No space left .* step 3, the last one, is not written"):
        save(small_disk, 3)
    assert step_of(small_disk) == 2
    assert len(files(small_disk)) == 1


def test_a_run_that_stops_on_a_full_disk_says_from_where_it_goes_on(
    small_disk: Path, logged: list[str]
) -> None:
    save(small_disk, 1)
    fill(small_disk)
    writer = CheckpointWriter(small_disk, keep=lambda _: False, before_write=lambda _: None)
    writer.submit(state(2))
    assert not writer.close(finished=False)
    assert any("step 2 " in line and "goes on from the one before" in line for line in logged)


def test_what_goes_wrong_in_the_thread_other_than_the_disk_ends_the_run(tmp_path: Path) -> None:
    def broken(_: dict[str, Any]) -> None:
        raise KeyError("beside")

    writer = CheckpointWriter(tmp_path, keep=lambda _: False, before_write=broken)
    writer.submit(state(1))
    with pytest.raises(KeyError, match="beside"):
        writer.submit(state(2))
    with pytest.raises(KeyError, match="beside"):
        CheckpointWriter.close(resubmitted(writer), finished=False)


def resubmitted(writer: CheckpointWriter) -> CheckpointWriter:
    writer.submit(state(3))
    return writer


def test_whole_archives_with_other_content_than_was_hashed_fall_back(tmp_path: Path) -> None:
    newest = save(tmp_path, 1, 2)[-1]
    content = torch.load(newest, weights_only=True)
    for change in (
        {"weights": content["weights"] + 1e-6},
        {"step": 4},
        {"optimizers": {}},
        {"extra": 0},
    ):
        torch.save({**content, **change}, newest)
        assert step_of(tmp_path) == 1
    torch.save(content, newest)
    assert step_of(tmp_path) == 2


def test_more_digits_than_the_name_has_room_for_stay_in_order(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999, 100_000_000, 100_000_001)
    assert step_of(tmp_path) == 100_000_001
    assert len(files(tmp_path)) == 2


def test_a_new_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None


def test_other_files_there_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    strangers = {
        tmp_path / "checkpoints" / name
        for name in ("step_best.pt", "step_00000009.pt.bak", ".step_00000009.pt.x.tmp")
    }
    for path in strangers:
        path.write_text("mine")
    assert load_checkpoint(tmp_path) is None
    save(tmp_path, 1, 2, 3)
    assert strangers < set(files(tmp_path))
    assert step_of(tmp_path) == 3


def zero_a_weight(content: bytes) -> bytes:
    position = content.index(
        torch.full((20,), 3.0).numpy().tobytes()
    )  # among the weights of step 2
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
def test_a_damaged_newest_falls_back_to_the_one_before(
    damage: str, tmp_path: Path, logged: list[str]
) -> None:
    newest = save(tmp_path, 1, 2)[-1]
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    assert step_of(tmp_path) == 1
    assert [line for line in logged if line.startswith(f"WARNING checkpoint {newest} is damaged")]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, "stale file handle"),
        PermissionError(errno.EACCES, "no"),
    ],
)
def test_a_newest_that_cannot_be_reached_is_not_taken_for_damaged(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = save(tmp_path, 1, 2)[-1]
    read = checkpoint._read

    def unreached(path: Path) -> dict[str, Any]:
        if path == newest:
            raise error
        return read(path)

    monkeypatch.setattr(checkpoint, "_read", unreached)
    with pytest.raises(type(error)):
        load_checkpoint(tmp_path)
    monkeypatch.setattr(checkpoint, "_read", read)
    assert step_of(tmp_path) == 2


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
    with pytest.raises(
        ValueError,
        match=r"none of the checkpoints in .*checkpoints can be read; put back good copies",
    ):
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

    save(Path(folder), dist.get_rank()) if dist.get_rank() == 0 else unwritten(Path(folder))
    dist.barrier()


def unwritten(folder: Path) -> None:
    writer = CheckpointWriter(folder, keep=lambda _: False, before_write=lambda _: None)
    writer.submit(state(7))
    writer.close(finished=True)


def test_only_rank_0_writes(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(save_own, str(tmp_path))
    assert [path.name for path in files(tmp_path)] == ["step_00000000.pt"]
