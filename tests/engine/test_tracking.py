"""Metrics reach their files whatever happens to Weights & Biases."""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from ranks import Ranks

from seed_exp.config.schema import TrackerConfig, TrackerMode
from seed_exp.engine.tracking import FileTracker, Tracker, WandbTracker, build_tracker


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def files(folder: Path) -> FileTracker:
    return FileTracker(folder, TrackerConfig("files"), {})


# --- files ------------------------------------------------------------------------------------------------------------


def test_each_call_is_one_line_that_is_on_disk_at_once(tmp_path: Path) -> None:
    tracker = files(tmp_path)
    tracker.log(3, {"a/loss": 1.5, "lr": 0.1})
    assert lines(tmp_path) == [{"step": 3, "a/loss": 1.5, "lr": 0.1}]
    tracker.log(4, {"a/loss": 1.25})
    tracker.log_speed(4, {"images_per_s": 99.5})
    assert lines(tmp_path)[1:] == [{"step": 4, "a/loss": 1.25}]
    assert lines(tmp_path, "speed.jsonl") == [{"step": 4, "images_per_s": 99.5}]
    tracker.close()


class FullDisk:
    """A file on a disk that has room for so many bytes, and then for all."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room, self.name = file, room, file.name

    def write(self, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return int(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_neither_ends_training_nor_loses_a_line(tmp_path: Path, logged: list[str]) -> None:
    tracker = files(tmp_path)
    disk = FullDisk(tracker._files["metrics.jsonl"], room=30)
    tracker._files["metrics.jsonl"] = disk
    for step in range(4):
        tracker.log(step, {"a/loss": 1.5})
    assert sum("WARNING cannot write to" in line and "No space left" in line for line in logged) == 1
    with pytest.raises(OSError, match="No space left"):
        tracker.position()  # a checkpoint must not say that more is there than is
    disk.room = 10_000
    assert tracker.position()["metrics.jsonl"] == (tmp_path / "metrics.jsonl").stat().st_size
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    tracker = files(tmp_path)
    values = [0.1, 1 / 3, 2**0.5, 1e-300, 5e20]
    for value in values:
        tracker.log(0, {"x": value})
    tracker.close()
    assert [line["x"] for line in lines(tmp_path)] == values


def test_rewinding_cuts_exactly_what_came_after(tmp_path: Path) -> None:
    tracker = files(tmp_path)
    for step in range(5):
        tracker.log(step, {"loss": 1 / (step + 1)})
        tracker.log_speed(step, {"rate": 10.0})
        if step == 2:
            position = tracker.position()
            kept = {name: (tmp_path / name).read_bytes() for name in position}
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed within a line
    again = files(tmp_path)
    again.rewind(position)
    assert {name: (tmp_path / name).read_bytes() for name in position} == kept
    again.log(3, {"loss": 0.5})
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert again.position()["metrics.jsonl"] == (tmp_path / "metrics.jsonl").stat().st_size
    again.close()


def test_without_a_position_everything_is_forgotten(tmp_path: Path) -> None:
    tracker = files(tmp_path)
    tracker.log(1, {"loss": 1.0})
    tracker.rewind({})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    tracker.log(1, {"loss": 2.0})
    tracker.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_file_removed_meanwhile_is_not_filled_up_with_zeros(tmp_path: Path) -> None:
    tracker = files(tmp_path)
    tracker.log(1, {"loss": 1.0})
    position = tracker.position()
    tracker.close()
    (tmp_path / "metrics.jsonl").unlink()
    again = files(tmp_path)
    again.rewind(position)
    again.log(2, {"loss": 2.0})
    again.close()
    assert lines(tmp_path) == [{"step": 2, "loss": 2.0}]


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown tracker 'wand'; did you mean 'wandb'"):
        build_tracker(tmp_path, TrackerConfig("wand"), {})


def log_one(folder: str) -> str:
    tracker = build_tracker(Path(folder), TrackerConfig("files"), {})
    tracker.rewind(tracker.position())
    tracker.log(1, {"loss": 1.0})
    tracker.log_speed(1, {"rate": 1.0})
    tracker.close()
    return type(tracker).__name__


def test_only_rank_0_writes(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(log_one, str(tmp_path)) == [FileTracker.__name__, Tracker.__name__]
    assert len(lines(tmp_path)) == 1


# --- Weights & Biases -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def to_wandb(folder: Path, mode: TrackerMode = TrackerMode.offline, **options: Any) -> WandbTracker:
    return WandbTracker(folder, TrackerConfig("wandb", mode=mode, **options), {"lr": 0.03, "data": {"source": "digits"}})


def records(path: Path) -> Iterator[Any]:
    """The records of an offline run: LevelDB's log format, 32 KiB blocks of records, each maybe in several pieces."""
    from wandb.proto import wandb_internal_pb2

    content, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, size, piece = struct.unpack_from("<IHB", content, position)
        whole += content[position + 7 : position + 7 + size]
        position += 7 + size
        if piece in (1, 4):  # the only or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def offline_runs(folder: Path) -> list[dict[str, Any]]:
    runs = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        run: dict[str, Any] = {"history": {}, "exit": None}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run["id"], run["project"], run["name"] = record.run.run_id, record.run.project, record.run.display_name
                run["tags"] = [*record.run.tags]
                run["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                run["history"][row["_step"]] = {key: value for key, value in row.items() if not key.startswith("_")}
            elif kind == "exit":
                run["exit"] = record.exit.exit_code
        runs.append(run)
    return runs


def test_without_an_account_a_whole_run_is_written_offline_and_resumed_under_its_id(tmp_path: Path, logged: list[str]) -> None:
    folder = tmp_path / "student-teacher"
    folder.mkdir()
    for first in (1, 4):
        tracker = to_wandb(folder, TrackerMode.auto, tags=["table1"])
        for step in range(first, first + 3):
            tracker.log(step, {"a/loss": 1 / step})
            tracker.log_speed(step, {"images_per_s": 10.0 * step})
        tracker.log(step, {"a/knn10": 50.0})
        tracker.close()
    wandb.teardown()  # ends the service process, which otherwise lives as long as the tests
    runs = offline_runs(folder)
    name = (folder / "wandb_id.txt").read_text().strip()
    assert [run["id"] for run in runs] == [name, name]
    for run, first in zip(runs, (1, 4), strict=True):
        assert (run["project"], run["name"], run["tags"], run["exit"]) == ("seed_exp", "student-teacher", ["table1"], 0)
        assert run["config"]["lr"] == 0.03
        assert run["config"]["data"] == {"source": "digits"}
        steps = range(first, first + 3)
        assert {step: row["a/loss"] for step, row in run["history"].items()} == {step: 1 / step for step in steps}
        assert {step: row["images_per_s"] for step, row in run["history"].items()} == {step: 10.0 * step for step in steps}
        assert run["history"][first + 2]["a/knn10"] == 50
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert any("writing offline; later: wandb sync" in line for line in logged)
    assert not [line for line in logged if line.startswith("WARNING")]


class FakeWandb:
    """Stands for the module `wandb`; waits for `gate` where told to."""

    def __init__(self, *, init_waits: bool = False, log_waits: bool = False, finish_waits: bool = False) -> None:
        self.waits = {"init": init_waits, "log": log_waits, "finish": finish_waits}
        self.gate, self.rows, self.arguments, self.finished = threading.Event(), [], {}, False
        self.Settings = SimpleNamespace

    def _pass(self, name: str) -> None:
        if self.waits[name]:
            self.gate.wait(60)

    def init(self, **arguments: Any) -> FakeWandb:
        self.arguments = arguments
        self._pass("init")
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._pass("log")
        self.rows.append((step, metrics))

    def finish(self) -> None:
        self._pass("finish")
        self.finished = True


def install(monkeypatch: pytest.MonkeyPatch, fake: Any) -> Any:
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    return fake


@pytest.mark.parametrize("error", [RuntimeError("no\nway"), OSError(28, "No space left"), KeyError("x"), TimeoutError()])
@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_an_error_of_wandb_is_a_warning(at: str, error: Exception, tmp_path: Path, monkeypatch: Any, logged: list[str]) -> None:
    fake = install(monkeypatch, FakeWandb())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    setattr(fake, at, fail)
    tracker = to_wandb(tmp_path)
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert not tracker._thread.is_alive()
    assert len(lines(tmp_path)) == 3
    warnings = [line for line in logged if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "metrics.jsonl goes on" in warnings[0]


@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_a_wandb_that_hangs_neither_stops_logging_nor_closing(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    fake = install(monkeypatch, FakeWandb(**{f"{at}_waits": True}))
    monkeypatch.setattr(WandbTracker, "PATIENCE_S", 0.05)
    tracker = to_wandb(tmp_path)
    for step in range(100):
        tracker.log(step, {"loss": 1.0})
    tracker.close()  # comes back although the gate is still shut
    assert tracker._thread.is_alive()
    assert len(lines(tmp_path)) == 100
    assert [line for line in logged if "did not finish within" in line]
    fake.gate.set()
    tracker._thread.join(60)
    assert fake.finished


def test_lines_beyond_the_queue_are_dropped_with_one_warning_and_the_run_is_still_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    fake = install(monkeypatch, FakeWandb(init_waits=True))
    monkeypatch.setattr(WandbTracker, "QUEUE_SIZE", 5)
    tracker = to_wandb(tmp_path)
    for step in range(1000):
        tracker.log(step, {"loss": 1.0})
    fake.gate.set()
    tracker.close()
    assert fake.finished
    assert [step for step, _ in fake.rows] == [0, 1, 2, 3, 4]
    assert len(lines(tmp_path)) == 1000
    assert len([line for line in logged if line.startswith("WARNING")]) == 1


def test_a_dead_sender_collects_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    fake = install(monkeypatch, FakeWandb())
    fake.init = None
    monkeypatch.setattr(WandbTracker, "QUEUE_SIZE", 5)
    tracker = to_wandb(tmp_path)
    tracker._thread.join(60)
    for step in range(20):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert len([line for line in logged if line.startswith("WARNING")]) == 1


def arguments(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: TrackerMode) -> dict[str, Any]:
    fake = install(monkeypatch, FakeWandb())
    to_wandb(folder, mode).close()
    return fake.arguments


def test_auto_is_online_for_those_who_are_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode(option: TrackerMode = TrackerMode.auto) -> str:
        return str(arguments(tmp_path, monkeypatch, option)["mode"])

    assert mode() == "offline"
    assert mode(TrackerMode.online) == "online"
    netrc = tmp_path / "netrc"
    netrc.write_text("machine elsewhere login user password x\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert mode() == "offline"
    netrc.write_text("machine wandb.example.com login user password x\n")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com:8080/path")
    assert mode() == "online"
    netrc.write_text("machine without end")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert mode() == "online"
    assert mode(TrackerMode.offline) == "offline"


def test_the_id_in_the_run_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = arguments(tmp_path, monkeypatch, TrackerMode.offline)
    assert first["id"] == (tmp_path / "wandb_id.txt").read_text().strip()
    assert arguments(tmp_path, monkeypatch, TrackerMode.offline)["id"] == first["id"]
    (tmp_path / "wandb_id.txt").write_text("abc123\n")
    assert arguments(tmp_path, monkeypatch, TrackerMode.offline)["id"] == "abc123"
