"""TensorBoard and MLflow get each step once, whatever is killed when; their own readers say so."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from seed_exp.base.redaction import redact_all
from seed_exp.config.options import flatten
from seed_exp.config.schema import TrackerConfig
from seed_exp.engine import mlflow_process, tracking
from seed_exp.engine.tensorboard_process import last_step
from seed_exp.engine.tracking import (
    FileTracker,
    FollowedTracker,
    MlflowTracker,
    RunFacts,
    TensorboardTracker,
    build_tracker,
)

ADDRESS = "https://user:s3cret-and-more@host/x.tsv?X-Amz-Signature=abcdef12"
OPTIONS = {"lr": 0.03, "steps": 6, "views": {"scale": [0.2, 1.0]}, "data": {"root": ADDRESS}}
FACTS = RunFacts("distill", "a+b-teacher", ["a", "b"], OPTIONS)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(FollowedTracker, "PATIENCE_S", 300)  # the machine may be busy
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "store"))
    return tmp_path / "store"


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (9, 8, 7)).save(path)


def start(
    kind: type[FollowedTracker], folder: Path, facts: RunFacts = FACTS, **more: Any
) -> FollowedTracker:
    folder.mkdir(exist_ok=True)
    tracker = kind(folder, TrackerConfig(kind.NAME, **more), facts)
    set_times(tracker)
    return tracker


def log(tracker: FileTracker, *steps: int) -> None:
    for step in steps:
        tracker.log(step, {"lr": 0.5 / step, "a/loss": 1 / step, "b/loss": 2.0 * step})
        tracker.log_speed(step, {"images_per_s": 10.0 * step})


def set_times(tracker: FollowedTracker, **seconds: float) -> None:
    """Gives the tracker's process other times than those in engine.follower."""
    module = f"{tracker.NAME}_process"
    times = {"LINGER_S": 300.0, **seconds}  # the machine may be busy
    changes = "".join(f"follower.{name} = {value}; " for name, value in times.items())
    code = f"from seed_exp.engine import follower, {module} as own; {changes}own.main()"
    tracker._command = [sys.executable, "-c", code, *tracker._command[3:]]


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def events(folder: Path, student: str) -> EventAccumulator:
    place = folder / "tensorboard" / student
    return EventAccumulator(str(place), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(folder: Path, student: str, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder, student).Scalars(name)]


def mlflow_runs(experiment: str = "seed_exp") -> dict[str, Run]:
    """Runs of an experiment, by student."""
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id]) if found else []
    return {run.data.tags["seed_exp.student"]: run for run in runs}


def history(run: Run, name: str) -> list[tuple[int, float]]:
    entries = MlflowClient().get_metric_history(run.info.run_id, name)
    return [(entry.step, entry.value) for entry in entries]


def whole_run(kind: type[FollowedTracker], folder: Path, **more: Any) -> None:
    """A run of three steps; a picture before them, another picture and a table at its end."""
    with start(kind, folder, **more) as tracker:
        tracker.log_picture("views", draw)
        tracker.rewind({})
        log(tracker, 1, 2, 3)
        tracker.log(3, {"a/knn10": 50.0})
        tracker.log_picture("a/map", draw)
        tracker.log_table("students", ["student", "top1"], [["a", 50.5]])


def assert_no_secret(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            for secret in (b"s3cret-and-more", b"abcdef12"):
                assert secret not in path.read_bytes(), path


# --- TensorBoard ----------------------------------------------------------------------------------


def test_tensorboard_reads_each_students_numbers_pictures_and_options(
    tmp_path: Path, logged: list[str]
) -> None:
    folder = tmp_path / "run"
    whole_run(TensorboardTracker, folder)
    assert scalars(folder, "a", "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert scalars(folder, "b", "loss") == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert scalars(folder, "b", "images_per_s") == [(1, 10.0), (2, 20.0), (3, 30.0)]
    assert scalars(folder, "a", "knn10") == [(3, 50.0)]
    found = events(folder, "a")
    (views,), (map_,) = found.Images("views"), found.Images("map")
    assert (views.step, map_.step, views.width, views.height) == (0, 3, 5, 4)
    assert map_.encoded_image_string == (folder / "media" / "a" / "map.png").read_bytes()
    (table,) = found.Tensors("students")
    assert b"50.5" in table.tensor_proto.string_val[0]
    options = str(found.summary_metadata["_hparams_/session_start_info"])
    assert "views.scale" in options
    assert found.Tags()["images"] == ["views", "map"]
    assert events(folder, "b").Tags()["images"] == ["views"]
    assert not [line for line in logged if line.startswith("WARNING")]
    assert_no_secret(folder)


def test_event_files_cut_by_a_kill_go_on_in_a_new_file_with_each_step_once(tmp_path: Path) -> None:
    folder, facts = tmp_path / "run", RunFacts("distill", "label", ["a"], {})
    place = folder / "tensorboard" / "a"
    first = start(TensorboardTracker, folder, facts)
    first.rewind({})
    log(first, 1, 2, 3)
    position = first.position()
    log(first, 4, 5, 6)
    wait_until(lambda: last_step(place) >= 5)
    assert first._process is not None
    os.kill(first._process.pid, signal.SIGKILL)
    FileTracker.close(first)
    (cut,) = place.iterdir()
    cut.write_bytes(cut.read_bytes()[:-7])  # within the record of step 5
    assert last_step(place) == 4
    for _ in range(2):  # the second one has nothing to send
        with start(TensorboardTracker, folder, facts) as again:
            again.rewind(position)
            log(again, 4, 5, 6, 7)
    assert [step for step, _ in scalars(folder, "a", "loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert len([*place.iterdir()]) == 2


def test_a_place_that_cannot_be_written_is_one_warning_and_is_tried_again(
    tmp_path: Path, logged: list[str]
) -> None:
    folder = tmp_path / "run"
    tracker = start(TensorboardTracker, folder)
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "a").touch()  # no folder
    set_times(tracker, RETRY_S=0.1)
    tracker.rewind({})
    log(tracker, 1, 2, 3)
    wait_until(lambda: [line for line in logged if line.startswith("WARNING TensorBoard: ")])
    (folder / "tensorboard" / "a").unlink()
    wait_until(lambda: last_step(folder / "tensorboard" / "b") == 2)
    tracker.close()
    assert [step for step, _ in scalars(folder, "a", "loss")] == [1, 2, 3]
    (warning,) = [line for line in logged if line.startswith("WARNING")]
    assert "not reached (" in warning
    assert "metrics.jsonl has everything" in warning


# --- MLflow ---------------------------------------------------------------------------------------


def test_mlflow_reads_each_students_numbers_pictures_options_and_file(
    tmp_path: Path, logged: list[str]
) -> None:
    folder = tmp_path / "run"
    weights = tmp_path / "b.safetensors"
    weights.write_text("weights of b")
    facts = RunFacts("distill", "label", ["a", "b"], OPTIONS, {"b": weights})
    whole_run(MlflowTracker, folder, facts=facts, project="mine", artifacts=True, tags=["t1"])
    runs = mlflow_runs("mine")
    assert history(runs["a"], "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert history(runs["b"], "loss") == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert history(runs["a"], "knn10") == [(3, 50.0)]
    assert history(runs["b"], "images_per_s") == [(1, 10.0), (2, 20.0), (3, 30.0)]
    assert runs["a"].info.run_name == "a in run"
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    options = flatten(redact_all(OPTIONS))
    root = options.pop("data.root")
    assert runs["a"].data.params == {
        "data.root": root,
        **{key: json.dumps(value) for key, value in options.items()},
    }
    assert runs["a"].data.tags["seed_exp.tags"] == "t1"
    client = MlflowClient()

    def files(run: Run, place: str = "") -> set[str]:
        return {file.path for file in client.list_artifacts(run.info.run_id, place)}

    assert files(runs["b"], "model") == {"model/b.safetensors"}
    assert files(runs["b"], "media") == {"media/views.png", "media/students.json"}
    assert files(runs["a"], "media") == {"media/views.png", "media/map.png", "media/students.json"}
    assert not [line for line in logged if line.startswith("WARNING")]
    assert_no_secret(tmp_path)


def test_an_interrupted_run_goes_on_in_mlflow_with_each_number_once(tmp_path: Path) -> None:
    folder, facts = tmp_path / "run", RunFacts("distill", "label", ["a"], {"lr": 0.03})
    first = start(MlflowTracker, folder, facts)
    first.rewind({})
    log(first, 1, 2, 3)
    position = first.position()
    log(first, 4)
    first.close(75)
    (run,) = mlflow_runs().values()
    assert (run.info.status, run.data.tags[mlflow_process.STEP]) == ("SCHEDULED", "3")
    # A request that was cut off has left one number of step 4.
    MlflowClient().log_metric(run.info.run_id, "loss", 1 / 4, step=4)
    changed = RunFacts("distill", "label", ["a"], {"lr": 0.03, "num_workers": 3})
    with start(MlflowTracker, folder, changed) as again:
        again.rewind(position)
        log(again, 4, 5)
    (run,) = mlflow_runs().values()
    assert run.info.status == "FINISHED"
    for name in ("loss", "lr", "images_per_s"):
        assert [step for step, _ in history(run, name)] == [1, 2, 3, 4, 5], name
    assert run.data.params == {"lr": "0.03", "num_workers": "3"}


@pytest.mark.slow
def test_a_server_that_is_away_is_one_warning_and_gets_everything_from_the_next_start(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    folder = tmp_path / "run"
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        tracker = start(MlflowTracker, folder)
        set_times(tracker, RETRY_S=0.1)
        tracker.rewind({})
        log(tracker, 1, 2)
        wait_until(lambda: [line for line in logged if "not reached" in line])
        log(tracker, 3)
        time.sleep(2)  # some more tries
        tracker.close()
    first, last = [line for line in logged if line.startswith("WARNING")]
    assert "not reached (" in first
    assert "stopped (" in last
    assert "the same command sends what is missing" in last
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(store))
    with start(MlflowTracker, folder) as again:
        again.rewind(again.position())
    assert history(mlflow_runs()["b"], "loss") == [(1, 2.0), (2, 4.0), (3, 6.0)]


@pytest.mark.slow
def test_a_server_that_hangs_neither_stops_training_nor_outlives_it(
    tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker = start(MlflowTracker, tmp_path / "run")
        set_times(tracker, LINGER_S=1)
        tracker.rewind({})
        log(tracker, *range(1, 500))
        silent.accept()
        monkeypatch.setattr(FollowedTracker, "PATIENCE_S", 0.1)
        tracker.close()
        assert tracker._process is not None
        assert tracker._process.wait(100) == 1
    assert [line for line in logged if "MLflow did not finish within" in line]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 499


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_missing_library_is_named_with_the_extra_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(tracking.distributed, "rank", lambda: 1)
    with pytest.raises(ValueError, match=rf"tracker={name} needs {name}, .*'seed_exp\[{name}\]'"):
        build_tracker(tmp_path, TrackerConfig(name), FACTS)
