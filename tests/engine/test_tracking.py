"""Metrics reach their files whatever happens to Weights & Biases.

W&B gets each step once, whatever is killed when.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import forks
import pytest
from disks import fill
from PIL import Image
from ranks import Ranks

from seed_exp.base.redaction import redact_all
from seed_exp.config.schema import TrackerConfig, TrackerMode
from seed_exp.engine.tracking import FileTracker, RunFacts, Tracker, WandbTracker, build_tracker
from seed_exp.engine.wandb_process import last_step

FACTS = RunFacts(
    "distill",
    "a+b-teacher-views-data",
    ["a", "b"],
    {"lr": 0.03, "decay": 1.0, "steps": 6, "data": {"root": None}},
)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def files(folder: Path) -> FileTracker:
    return FileTracker(folder, TrackerConfig("files"), FACTS)


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4)).save(path)


# --- files ----------------------------------------------------------------------------------------


def test_each_call_is_one_line_that_is_on_disk_at_once(tmp_path: Path) -> None:
    tracker = files(tmp_path)
    tracker.log(3, {"a/loss": 1.5, "lr": 0.1})
    assert lines(tmp_path) == [{"step": 3, "a/loss": 1.5, "lr": 0.1}]
    tracker.log(4, {"a/loss": 1.25})
    tracker.log_speed(4, {"images_per_s": 99.5})
    assert lines(tmp_path)[1:] == [{"step": 4, "a/loss": 1.25}]
    assert lines(tmp_path, "speed.jsonl") == [{"step": 4, "images_per_s": 99.5}]
    tracker.close()


def test_a_full_disk_neither_ends_training_nor_loses_a_line(
    small_disk: Path, logged: list[str]
) -> None:
    tracker = files(small_disk)
    ballast = fill(small_disk, leave=4096)
    for step in range(99):
        tracker.log(step, {"a/loss": 1.5, "a/other": 0.1})
        tracker.log_speed(step, {"images_per_s": 99.5})
    assert 0 < (small_disk / "metrics.jsonl").stat().st_size <= 4096, "the disk took a part"
    warnings = [line for line in logged if "WARNING cannot write metrics" in line]
    assert sorted(
        re.findall(r"No space left on device: '.*/(\w+)\.jsonl'", "\n".join(warnings))
    ) == [
        "metrics",
        "speed",
    ]
    position = tracker.position()
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
        tracker.sync()  # a checkpoint must not say that more is there than is
    ballast.unlink()
    tracker.sync()
    assert position == {name: (small_disk / name).stat().st_size for name in position}
    assert [line["step"] for line in lines(small_disk)] == list(range(99))


def test_metrics_that_are_not_on_disk_at_the_end_are_an_error_of_a_run_that_has_none(
    small_disk: Path, logged: list[str]
) -> None:
    for status in (0, 75):
        tracker = files(small_disk)
        ballast = fill(small_disk)
        for step in range(99):
            tracker.log(step, {"a/loss": 1.5, "a/other": 0.1, "a/third": 0.1})
        if status == 0:
            with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
                tracker.close(status)
        else:
            tracker.close(status)
            assert "WARNING the last lines of" in logged[-1]
        ballast.unlink()


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
        build_tracker(tmp_path, TrackerConfig("wand"), FACTS)


def log_one(folder: str) -> str:
    tracker = build_tracker(Path(folder), TrackerConfig("files"), FACTS)
    tracker.rewind(tracker.position())
    tracker.log(1, {"loss": 1.0})
    tracker.log_speed(1, {"rate": 1.0})
    tracker.close()
    return type(tracker).__name__


def test_only_rank_0_writes(two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks.run(log_one, str(tmp_path)) == [FileTracker.__name__, Tracker.__name__]
    assert len(lines(tmp_path)) == 1


def test_a_picture_is_drawn_once_in_a_run_and_shown_at_the_step_before_it(
    tmp_path: Path, logged: list[str]
) -> None:
    drawn: list[Path] = []
    for _ in range(2):
        tracker = files(tmp_path)
        tracker.log_picture("views", lambda path: (drawn.append(path), draw(path))[1])
        tracker.log(7, {"loss": 1.0})
        tracker.log_picture("a/map", draw)
        tracker.log_table("students", ["student", "top1"], [["a", 50.5]])
        tracker.close()
    assert drawn == [tmp_path / "media" / "views.png"]
    assert json.loads((tmp_path / "media" / "index.json").read_text()) == {
        "views": {"step": 0, "picture": "views.png"},
        "a/map": {"step": 7, "picture": "a/map.png"},
        "students": {"step": 7, "columns": ["student", "top1"], "rows": [["a", 50.5]]},
    }
    assert not [line for line in logged if line.startswith("WARNING")]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("cannot decode image")]
)
def test_a_picture_that_cannot_be_drawn_does_not_end_training(
    error: Exception, tmp_path: Path, logged: list[str]
) -> None:
    def fail(path: Path) -> None:
        raise error

    tracker = files(tmp_path)
    tracker.log_picture("views", fail)
    tracker.close()
    assert [
        line
        for line in logged
        if line.startswith("WARNING views is not shown: ") and str(error) in line
    ]


# --- Weights & Biases -----------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(WandbTracker, "PATIENCE_S", 100)  # the machine may be busy
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home / name.lower()))


def to_wandb(folder: Path, facts: RunFacts = FACTS, **options: Any) -> WandbTracker:
    folder.mkdir(exist_ok=True)
    return WandbTracker(folder, TrackerConfig("wandb", **options), facts)


def ids(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "wandb.json").read_text())["ids"]
    return found


def segments(folder: Path, student: str) -> list[list[dict[str, Any]]]:
    """Records of the student's offline runs, in order of time, as wandb itself reads them."""
    paths = sorted(folder.glob(f"wandb/offline-run-*-{ids(folder)[student]}/*.wandb"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    printed = [
        forks.run([*command, str(path)], capture_output=True, check=True, text=True).stdout
        for path in paths
    ]
    return [[json.loads(line) for line in text.splitlines()] for text in printed]


def of_kind(kind: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def history(records: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """All steps with their metrics, in the order in which they were sent."""
    rows = [row["item"] for row in of_kind("history", records)]
    return [
        (row["_step"], {key: value for key, value in row.items() if not key.startswith("_")})
        for row in rows
    ]


def test_without_an_account_each_student_has_an_offline_run_of_its_own(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_TOKEN", "s3cret-and-more")
    monkeypatch.setenv("HF_TOKEN", "hunter22-hunter22")
    folder = tmp_path / "run"
    address = "https://host/x.tsv?part=1&X-Amz-Signature=abcdef12"
    options = {**FACTS.options, "data": {"root": address, "note": "s3cret-and-more"}}
    folder.mkdir()
    weights = {name: folder / f"{name}.safetensors" for name in FACTS.students}
    weights["b"].write_text("weights of b")
    facts = RunFacts(FACTS.command, FACTS.label, FACTS.students, options, weights)
    with to_wandb(folder, facts, tags=["table1", "s3cret-and-more"], artifacts=True) as tracker:
        tracker.log_picture("views", draw)
        tracker.rewind({})
        for step in (2, 4, 6):
            tracker.log(
                step,
                {"lr": 0.1 / step, "a/loss": 1 / step, "b/loss": 2.0 * step, "b/x/y": float(step)},
            )
            tracker.log_speed(step, {"images_per_s": 10.0 * step})
        tracker.log(6, {"a/knn10": 50.0, "b/knn10": 60.0})
        tracker.log_picture("a/map", draw)
        tracker.log_table("students", ["student", "top1"], [["a", 50.5]])

    (records,), (others,) = segments(folder, "a"), segments(folder, "b")
    for student, mine in (("a", records), ("b", others)):
        (run,) = of_kind("run", mine)
        assert (run["run_id"], run["display_name"]) == (ids(folder)[student], f"{student} in run")
        assert (run["project"], run["run_group"], run["job_type"]) == (
            "seed_exp",
            FACTS.label,
            "distill",
        )
        assert run["tags"] == ["table1", "***"]
        config = run["config"]["update"]
        del config["_wandb"]
        assert config == {"student": student, **redact_all(options)}
        assert isinstance(config["lr"], float)
        assert [record.get("exit_code", 0) for record in of_kind("exit", mine)] == [0]

    rows = history(records)
    assert [step for step, _ in rows] == [0, 2, 4, 6]
    for step, row in rows[1:3]:
        assert row == {"lr": 0.1 / step, "loss": 1 / step, "images_per_s": 10.0 * step}
    last = rows[-1][1]
    assert (last["loss"], last["knn10"], last["images_per_s"]) == (1 / 6, 50.0, 60.0)
    assert rows[0][1]["views._type"] == last["map._type"] == "image-file"
    assert (last["students._type"], last["students.nrows"], last["students.ncols"]) == (
        "table-file",
        1,
        2,
    )
    assert [(step, row.get("loss"), row.get("x/y")) for step, row in history(others)[1:]] == [
        (step, 2.0 * step, float(step)) for step in (2, 4, 6)
    ]
    assert "map._type" not in history(others)[-1][1]
    models = [
        artifact["name"] for artifact in of_kind("artifact", others) if artifact["type"] == "model"
    ]
    assert models == [f"model-{ids(folder)['b']}"]

    sync = [line for line in logged if f"wandb sync {folder}/wandb/offline-run-*" in line]
    assert len(sync) == 2
    assert [line for line in logged if "No API key" in line and line.startswith("INFO")]
    assert not [line for line in logged if line.startswith("WARNING")]
    for path in folder.rglob("*"):
        if path.is_file():
            for secret in (b"s3cret-and-more", b"hunter22-hunter22", b"abcdef12"):
                assert secret not in path.read_bytes(), path


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(tracker: WandbTracker, how: str) -> None:
    """The end of a training that was interrupted."""
    process = tracker._process
    assert process is not None
    if how == "stopped by the scheduler":
        tracker.close(75)
        return
    FileTracker.close(tracker)
    assert process.stdin is not None
    if how == "all processes killed":
        service = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for number in (*map(int, service), process.pid):
            os.kill(number, signal.SIGKILL)
    elif how == "service terminated":
        service = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for number in map(int, service):
            os.kill(number, signal.SIGTERM)
    process.stdin.close()
    process.wait(100)


@pytest.mark.parametrize(
    "how",
    [
        "all processes killed",
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in ("training killed", "stopped by the scheduler", "service terminated")
        ),
    ],
)
def test_an_interrupted_run_goes_on_under_its_id_with_each_step_once(
    how: str, tmp_path: Path
) -> None:
    facts = RunFacts("distill", "label", ["a"], {})
    folder = tmp_path / "run"

    def log(tracker: WandbTracker, step: int) -> None:
        tracker.log(step, {"a/loss": 1 / step})
        tracker.log_speed(step, {"images_per_s": step + (0.0 if tracker is first else 0.5)})

    first = to_wandb(folder, facts, mode=TrackerMode.offline)
    first.rewind({})
    for step in (1, 2, 3):
        log(first, step)
    position = first.position()
    log(first, 4)
    log(first, 5)
    (run_id,) = ids(folder).values()
    wait_until(lambda: last_step(folder, run_id) >= 2)
    log(first, 6)
    end(first, how)

    with to_wandb(folder, facts, mode=TrackerMode.offline) as again:
        again.rewind(position)
        for step in (4, 5, 6):
            log(again, step)
        again.log(6, {"a/knn10": 50.0})  # what the interrupted one did not come to
        log(again, 7)
    assert ids(folder) == {"a": run_id}
    before, after = segments(folder, "a")
    rows = history(before + after)
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for _, row in rows] == [1 / step for step in range(1, 8)]
    assert [row["images_per_s"] // 1 for _, row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert dict(rows)[6]["knn10"] == 50


def test_a_run_that_is_done_is_not_begun_again(tmp_path: Path) -> None:
    facts = RunFacts("distill", "label", ["a"], {})
    for _ in range(2):
        with to_wandb(tmp_path / "run", facts, mode=TrackerMode.offline) as tracker:
            tracker.rewind(tracker.position())
            if not lines(tmp_path / "run"):
                tracker.log(1, {"a/loss": 1.0})
    assert len(segments(tmp_path / "run", "a")) == 1


@pytest.mark.slow
def test_what_a_full_disk_cut_off_is_said_and_written_by_the_same_command(
    small_disk: Path, logged: list[str]
) -> None:
    tracker = to_wandb(small_disk)
    tracker.rewind({})
    tracker.log(1, {"a/loss": 1.0, "b/loss": 1.0})
    tracker.log(2, {"a/loss": 1.0, "b/loss": 1.0})
    wait_until(lambda: len([*small_disk.glob("wandb/offline-run-*")]) == 2)
    ballast = fill(small_disk)
    for step in range(3, 400):
        tracker.log(step, {"a/loss": 1.0, "b/loss": 1.0, "lr": step / 7})
    time.sleep(5)  # W&B tries to write them
    ballast.unlink()
    tracker.close()
    assert len(lines(small_disk)) == 399
    known = ids(small_disk)
    assert min(last_step(small_disk, known[name]) for name in known) < 399
    wait_until(lambda: any("the disk did not take all" in line for line in logged))
    again = to_wandb(small_disk)
    again.rewind({name: (small_disk / name).stat().st_size for name in again.position()})
    again.close()
    wait_until(lambda: all(last_step(small_disk, known[name]) == 399 for name in known))


def test_what_is_read_back_of_a_torn_file_is_what_it_begins_with(tmp_path: Path) -> None:
    facts = RunFacts(
        "distill", "label", ["a"], {"text": "x" * 70_000}
    )  # a record over several blocks
    with to_wandb(tmp_path / "run", facts, mode=TrackerMode.offline) as tracker:
        tracker.rewind({})
        for step in range(1, 40):
            tracker.log(step, {"a/loss": 1 / step})
    (path,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    (run_id,) = ids(tmp_path / "run").values()
    whole = path.read_bytes()
    found = []
    # Few cuts in the long first record, many where the steps are.
    for size in (
        *range(0, len(whole) - 20_000, 9_973),
        *range(len(whole) - 20_000, len(whole), 499),
    ):
        path.write_bytes(whole[:size])
        found.append(last_step(tmp_path / "run", run_id))
    path.write_bytes(whole)
    assert found == sorted(found)
    assert found[0] == -1
    assert len(set(found)) > 10
    assert last_step(tmp_path / "run", run_id) == 39
    path.write_bytes(whole + bytes(100))
    assert last_step(tmp_path / "run", run_id) == 39


# --- with a W&B that misbehaves -------------------------------------------------------------------


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the stand-in for wandb lists the calls that it gets."""
    monkeypatch.setenv(
        "PYTHONPATH", str(Path(__file__).parents[1] / "fake_wandb"), prepend=os.pathsep
    )
    monkeypatch.setenv("WANDB_FAKE_CALLS", str(tmp_path / "calls.jsonl"))
    return tmp_path / "calls.jsonl"


def asked(path: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["call"] == name]


def train(folder: Path) -> WandbTracker:
    tracker = to_wandb(folder)
    tracker.rewind({})
    for step in range(1, 6):
        tracker.log(step, {"a/loss": 1 / step})
    return tracker


def lingering(folder: Path, seconds: float) -> WandbTracker:
    """A tracker whose process is less patient than usual when the training has ended."""
    tracker = to_wandb(folder)
    code = f"from seed_exp.engine import follower; follower.LINGER_S = {seconds}; "
    code += "from seed_exp.engine import wandb_process; wandb_process.main()"
    tracker._command = [sys.executable, "-c", code, str(folder), "auto"]
    return tracker


@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_a_wandb_that_hangs_neither_stops_training_nor_outlives_it(
    at: str, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setenv("WANDB_FAKE", f"{at} hangs")
    monkeypatch.setattr(WandbTracker, "PATIENCE_S", 0.1)
    tracker = lingering(tmp_path / "run", 1)
    tracker.rewind({})
    for step in range(2000):
        tracker.log(step, {"a/loss": 1.0})
    assert tracker._process is not None
    if at == "init":  # it does hang while training goes on
        wait_until(lambda: calls.exists() and asked(calls, "init"))
        assert tracker._process.poll() is None
    tracker.close()
    assert [
        line
        for line in logged
        if line.startswith("WARNING W&B did not finish within") and "same command" in line
    ]
    assert len(lines(tmp_path / "run")) == 2000
    assert tracker._process.wait(100) == 1


def test_what_fails_online_is_done_offline_under_the_same_id(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setenv("WANDB_FAKE", "init fails online")
    train(tmp_path / "run").close()
    assert [line["mode"] for line in asked(calls, "init")] == [None, "offline", "offline"]
    for run_id in ids(tmp_path / "run").values():
        assert [line["step"] for line in asked(calls, "log") if line["id"] == run_id] == [
            1,
            2,
            3,
            4,
            5,
        ]
    assert [line for line in logged if line == "WARNING W&B: no way; this run goes on offline"]
    assert len([line for line in logged if "wandb sync" in line]) == 2


def test_a_server_that_has_not_answered_at_the_end_is_not_waited_for(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setenv("WANDB_FAKE", "init hangs online")
    train(tmp_path / "run").close()
    assert [line["mode"] for line in asked(calls, "init")] == [None, "offline", "offline"]
    assert [line["step"] for line in asked(calls, "log")][::2] == [1, 2, 3, 4, 5]
    assert [line["exit_code"] for line in asked(calls, "finish")] == [0, 0]
    assert [
        line
        for line in logged
        if line == "WARNING W&B: the server has not answered yet; this run goes on offline"
    ]


@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_what_fails_offline_too_is_a_warning(
    at: str, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    monkeypatch.setenv("WANDB_FAKE", f"{at} fails")
    train(tmp_path / "run").close()
    assert len(lines(tmp_path / "run")) == 5
    warnings = [line for line in logged if line.startswith("WARNING")]
    assert len(warnings) == 2
    assert (
        "stopped (no way); metrics.jsonl goes on, and the same command sends the rest"
        in warnings[1]
    )


def test_a_process_that_dies_or_cannot_be_started_is_a_warning(
    tmp_path: Path, logged: list[str]
) -> None:
    for command, expected in (
        (["/nowhere/python"], "W&B does not start"),
        (["false"], "W&B ended with status 1"),
    ):
        tracker = to_wandb(tmp_path / "run")
        tracker._command = command
        tracker.rewind({})
        tracker.log(1, {"a/loss": 1.0})
        tracker.close()
        assert expected in [line for line in logged if line.startswith("WARNING")][-1]


def test_online_it_goes_on_behind_what_the_server_has(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_FAKE_STEP", "4")
    train(tmp_path / "run").close()
    assert [line["mode"] for line in asked(calls, "init")] == [
        None,
        None,
    ]  # as WANDB_MODE and the account want it
    assert [line["step"] for line in asked(calls, "log")] == [4, 4, 5, 5]
    assert {line["resume"] for line in asked(calls, "init")} == {"allow"}
    settings = [line["settings"] for line in asked(calls, "init")]
    assert [setting["x_disable_stats"] for setting in settings] == [
        False,
        True,
    ]  # the load of the machine once, of this process
    assert {setting["x_stats_pid"] for setting in settings} == {os.getpid()}
    assert all(setting["disable_git"] and setting["disable_code"] for setting in settings)


@pytest.mark.parametrize(("status", "last"), [(0, 5), (75, 4), (130, 4), (1, 4)])
def test_the_last_step_of_an_interrupted_run_waits_for_more_and_the_run_says_how_it_ended(
    status: int, last: int, calls: Path, tmp_path: Path
) -> None:
    train(tmp_path / "run").close(status)
    assert max(line["step"] for line in asked(calls, "log")) == last
    assert [line["exit_code"] for line in asked(calls, "finish")] == [status, status]
    assert len(asked(calls, "mark_preempting")) == (2 if status == 75 else 0)


def test_leaving_the_context_says_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    monkeypatch.setattr(FileTracker, "close", lambda self, status=0: closed.append(status))
    for error in (None, SystemExit(75), SystemExit("text"), ValueError(), KeyboardInterrupt()):
        with suppress(BaseException), files(tmp_path):
            if error is not None:
                raise error
    assert closed == [0, 75, 1, 1]  # a second Ctrl-C waits for nothing


def test_signals_to_the_training_do_not_reach_the_process_that_sends(
    calls: Path, tmp_path: Path
) -> None:
    tracker = train(tmp_path / "run")
    wait_until(lambda: calls.exists() and asked(calls, "init"))
    assert tracker._process is not None
    assert os.getpgid(tracker._process.pid) != os.getpgid(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(tracker._process.pid, number)
    tracker.close()
    assert [line["step"] for line in asked(calls, "log")][-1] == 5


PARENT = """
import os, signal, subprocess, sys
process = subprocess.Popen(
    sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
)
if os.fork() == 0:  # a worker with a copy of the pipe, which outlives the training
    signal.pause()
print(process.pid, os.getpid(), flush=True)
signal.pause()
"""


def test_it_ends_when_the_training_was_killed_though_a_worker_holds_the_pipe(
    calls: Path, tmp_path: Path
) -> None:
    tracker = to_wandb(tmp_path / "run")
    tracker.log(1, {"a/loss": 1.0})
    tracker.log(2, {"a/loss": 1.0})
    command = [sys.executable, "-c", PARENT, *tracker._command]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, start_new_session=True, text=True
    ) as parent:
        assert parent.stdout is not None
        try:
            sender, training = map(int, parent.stdout.readline().split())
            wait_until(lambda: calls.exists() and asked(calls, "log"))
            os.kill(training, signal.SIGKILL)
            wait_until(lambda: asked(calls, "finish"))
            wait_until(
                lambda: not Path(f"/proc/{sender}/exe").exists()
            )  # gone, or waiting for its parent to notice
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_two_processes_never_send_at_once(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_FAKE", "log hangs")
        first = lingering(tmp_path / "run", 1)
        first.rewind({})
        first.log(1, {"a/loss": 1.0})
        first.log(2, {"a/loss": 1.0})
        wait_until(lambda: calls.exists() and asked(calls, "log"))
    again = train(tmp_path / "run")
    assert again._process is not None
    time.sleep(1)
    assert len(asked(calls, "init")) == 1  # that of the first
    first.PATIENCE_S = 0.1  # type: ignore[misc]
    first.close(1)
    again.close()
    assert len(asked(calls, "init")) == 3


def test_a_students_file_is_sent_whenever_it_was_written_anew_and_only_on_request(
    calls: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    file = tmp_path / "a.safetensors"
    facts = RunFacts("distill", "label", ["a"], {}, {"a": file})
    for artifacts in (False, True):
        with to_wandb(folder, facts, artifacts=artifacts) as tracker:
            tracker.rewind({})
            tracker.log(1, {"a/loss": 1.0})
            tracker.log(2, {"a/loss": 1.0})
            for num, content in enumerate(("first", "second")):
                file.write_text(content)
                if artifacts:
                    wait_until(lambda: calls.exists() and len(asked(calls, "log_artifact")) > num)  # noqa: B023
        assert bool(asked(calls, "log_artifact")) == artifacts
    assert [line["content"] for line in asked(calls, "log_artifact")] == ["first", "second"]
    assert {line["name"] for line in asked(calls, "log_artifact")} == {f"model-{ids(folder)['a']}"}
