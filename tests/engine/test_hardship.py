"""Full disks, short memory, lost permissions and kills, as the system gives them.

Nothing here is simulated: disks are file systems of a few MiB, memory is limited by the kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import hardship
import pytest
import tiny
import torch
from disks import FailingDisk, fill
from safetensors.torch import save_file

from seed_exp.config.compose import compose
from seed_exp.engine import checkpoint
from seed_exp.engine.checkpoint import CheckpointWriter
from seed_exp.engine.run import open_run


def ordinary(*arguments: object) -> list[str]:
    """Command line of tests/hardship.py as an ordinary user, whom permissions bind."""
    command = [sys.executable, hardship.__file__, *map(str, arguments)]
    if os.geteuid() != 0:
        return command
    if shutil.which("setpriv") is None:
        pytest.skip("root cannot give up its rights here: no setpriv command")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]


def environment() -> dict[str, str]:
    places = [str(Path(hardship.__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ordinary(*arguments), env=environment(), capture_output=True, text=True, timeout=300
    )


# --- disks ----------------------------------------------------------------------------------------


class Full:
    """An evaluation that finds the disk full when it is called for the third time: at the end."""

    def __init__(self, disk: Path | None, room_after: float | None = None) -> None:
        self.disk, self.room_after, self.calls = disk, room_after, 0

    def __call__(self, _: Collection[str]) -> dict[str, float]:
        self.calls += 1
        if self.calls == 3 and self.disk is not None:
            time.sleep(0.5)  # the checkpoint before the evaluation is being written
            ballast = fill(self.disk)
            if self.room_after is not None:
                threading.Timer(self.room_after, ballast.unlink).start()
        # More than a page, because a file may have the rest of its last page on a full disk, too.
        return {f"a/norm{number}": float(self.calls) for number in range(400)}


@pytest.mark.parametrize("room_after", [0.3, None])
def test_a_disk_that_is_full_at_the_last_step_is_waited_for_and_else_an_error(
    room_after: float | None, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PAUSE_S", 0.2)
    quiet = tiny.train(tiny.seed(), tmp_path / "quiet", evaluate=Full(None))
    folder, evaluate = small_disk / "run", Full(small_disk, room_after)
    if room_after is None:
        with pytest.raises(OSError, match=r"No space left.* step 12, the last one, is not written"):
            tiny.train(tiny.seed(), folder, evaluate=evaluate)
        (small_disk / "ballast").unlink()
        evaluate.disk, evaluate.calls = None, 2
    tiny.train(tiny.seed(), folder, evaluate=evaluate)
    assert tiny.last_checkpoint(folder)["evaluated"]
    tiny.assert_same(tiny.last_checkpoint(folder), tiny.last_checkpoint(quiet))
    assert (folder / "metrics.jsonl").read_bytes() == (quiet / "metrics.jsonl").read_bytes()


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[FailingDisk]:
    try:
        disk = FailingDisk(tmp_path / "disk", tmp_path / "image", num_mib=16)
    except OSError as error:
        pytest.skip(str(error))
    yield disk
    disk.remove()


def test_a_disk_that_can_only_be_read_from_mid_training_on_is_an_error_at_the_end(
    failing_disk: FailingDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setattr(checkpoint, "PAUSE_S", 0.1)
    quiet = tiny.train(tiny.seed(), tmp_path / "quiet", evaluate=Full(None))
    folder, evaluate, calls = failing_disk.folder / "run", Full(None), []

    def fail_at_second(names: Collection[str]) -> dict[str, float]:
        calls.append(names)
        if len(calls) == 2:
            failing_disk.fail()
        return evaluate(names)

    with pytest.raises(
        OSError, match=r"Read-only file system: the checkpoint of step 12, the last"
    ):
        tiny.train(tiny.seed(), folder, evaluate=fail_at_second)
    assert [line for line in logged if "training goes on" in line]
    failing_disk.repair()
    evaluate.calls = 1
    tiny.train(tiny.seed(), folder, evaluate=evaluate)
    tiny.assert_same(tiny.last_checkpoint(folder), tiny.last_checkpoint(quiet))
    assert (folder / "metrics.jsonl").read_bytes() == (quiet / "metrics.jsonl").read_bytes()


def test_permission_that_an_ordinary_user_loses_costs_checkpoints_and_not_the_training(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    ended = start("permission", folder)
    assert ended.returncode == 0, ended.stderr
    assert "could not write the checkpoint of step 5 ([Errno 13] Permission denied" in ended.stderr
    assert "training goes on" in ended.stderr
    assert tiny.last_checkpoint(folder)["step"] == 12


@pytest.mark.slow
def test_when_one_of_two_processes_loses_its_disk_at_the_end_both_say_so(small_disk: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            ordinary("full", small_disk / "run"),
            env={**environment(), **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        assert rank.returncode == 1
        assert "done" not in out
        assert "No space left on device: the checkpoint of step 12, the last one" in err


# --- memory ---------------------------------------------------------------------------------------


def test_short_memory_is_not_taken_for_damage_and_nothing_is_to_be_removed(tmp_path: Path) -> None:
    tensors = {"weights": torch.arange(30_000_000.0)}  # 120 MB
    writer = CheckpointWriter(tmp_path, keep=lambda _: False, before_write=lambda _: None)
    for step in (1, 2):
        writer.submit({"step": step, **tensors})
    writer.close(finished=True)
    torch.save(tensors, tmp_path / "weights.pt")
    torch.save(tensors, tmp_path / "weights.old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "weights.safetensors")
    *short, run, old, new, safetensors = start("memory", tmp_path).stdout.splitlines()
    assert len(short) == 8
    for line in short:
        assert "too little memory to read" in line
        assert "may be whole" in line
        assert not re.search("damaged|remove|delete|broken|download", line)
    for line in short[::4]:
        assert "step_00000002.pt" in line, "the one before is not taken instead"
    assert [line.endswith("done") for line in (run, old, new, safetensors)] == [True] * 4


# --- kills ----------------------------------------------------------------------------------------

OPTIONS = ["data=digits", "views=digits", "student=convnet_w2", "device=cpu", "tracker=files"]


KILLED = """
import os, pathlib, sys
from seed_exp.base.files import atomic_write
with atomic_write(pathlib.Path(sys.argv[1])) as file:
    file.write(bytes(1 << 16))
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_start(tmp_path: Path) -> None:
    config = compose("pretrain", [*OPTIONS, f"run_dir={tmp_path / 'run'}"])

    def opened() -> Any:
        return open_run("pretrain", "label", config, {}, torch.device("cpu"))

    places = [Path("checkpoints", "step_00000004.pt"), Path("students", "a.safetensors")]
    with opened() as run:
        for place in places:
            command = [sys.executable, "-c", KILLED, str(run.folder / place)]
            assert subprocess.run(command).returncode == -signal.SIGKILL
        mine = [run.folder / "checkpoints" / ".notes.tmp", run.folder / "students" / "a.tmp"]
        for path in mine:
            path.touch()
    left = {
        path for place in ("checkpoints", "students") for path in (run.folder / place).iterdir()
    }
    assert len(left) == 4, "two of them from kills"
    with opened():
        now = [*(run.folder / "checkpoints").iterdir(), *(run.folder / "students").iterdir()]
        assert sorted(now) == sorted(mine)


def test_a_second_process_removes_nothing_of_the_one_that_writes(tmp_path: Path) -> None:
    config = compose("pretrain", [*OPTIONS, f"run_dir={tmp_path / 'run'}"])
    lock = "import sys,fcntl; f=open(sys.argv[1],'a+'); fcntl.lockf(f, fcntl.LOCK_EX); "
    lock += "print('held', flush=True); sys.stdin.read()"
    with open_run("pretrain", "label", config, {}, torch.device("cpu")) as run:
        writing = run.folder / "checkpoints" / ".step_00000004.pt.0123456789abcdef.tmp"
        writing.parent.mkdir()
        writing.touch()
    with subprocess.Popen(
        [sys.executable, "-c", lock, str(run.folder / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(ValueError, match="is in use by"),
            open_run("pretrain", "label", config, {}, torch.device("cpu")),
        ):
            pass
        other.kill()
    assert writing.exists()
