"""The state of a cell, from what its jobs left and what the scheduler says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seed_exp.cluster.sweep_cells import (
    Attempt,
    Cell,
    ScheduledJob,
    State,
    Status,
    error_line,
    labels,
    last_line,
    load_cell,
    progress_of,
    save_cell,
    status_of,
)

RUNNING = ScheduledJob(State.RUNNING, "RUNNING", "node7", 2)
OPTIONS: dict[str, Any] = {"steps": None, "epochs": 10, "batch_size": 32}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "runs/sweeps/s/logs").mkdir(parents=True)
    return tmp_path / "runs/sweeps"


def attempt(
    home: Path,
    job: str,
    *,
    log: str | None = None,
    ending: str | None = None,
    cancelled: bool = False,
) -> Attempt:
    """A job and what it left."""
    logs = home / "s/logs"
    if log is not None:
        (logs / f"{job}.log").write_text(log)
    if ending is not None:
        (logs / f"{job}.exit").write_text(ending)
    if cancelled:
        (logs / f"{job}.cancel").touch()
    return Attempt(job, "s/logs", "2026-01-01T00:00:00+00:00", "abc")


def run_folder(home: Path, *, done: bool = False) -> str:
    """A run that has begun; the line with which its log begins."""
    run = home.parents[1] / "runs/distill/x"
    run.mkdir(parents=True)
    if done:
        (run / "done.json").write_text("{}")
    return "run folder: runs/distill/x\n1437 images\n"


def look(home: Path, *attempts: Attempt, **jobs: ScheduledJob) -> Status:
    return status_of(
        home,
        Cell("id", "distill", [], list(attempts)),
        {f"1_{name[1:]}": job for name, job in jobs.items()},
    )


@pytest.mark.parametrize(
    ("ending", "done", "cancelled", "expected"),
    [
        ("0 0 n", True, False, State.FINISHED),
        ("0 0 n", True, True, State.FINISHED),  # it was through before the signal reached it
        (None, True, False, State.FINISHED),  # killed after its last file
        ("1 0 n", False, False, State.FAILED),
        ("75 0 n", False, False, State.STOPPED),
        ("75 0 n", False, True, State.CANCELLED),
        (None, False, True, State.CANCELLED),
        (None, False, False, State.UNKNOWN),
        ("0 0 n", False, False, State.UNKNOWN),  # somebody removed the run folder
    ],
)
def test_without_a_scheduler_the_files_say_how_a_job_ended(
    home: Path, ending: str | None, done: bool, cancelled: bool, expected: State
) -> None:
    log = run_folder(home, done=done)
    assert (
        look(home, attempt(home, "1_0", log=log, ending=ending, cancelled=cancelled)).state
        is expected
    )


def test_the_scheduler_is_believed_about_a_job_that_it_has_whatever_an_earlier_start_left(
    home: Path,
) -> None:
    log = run_folder(home) + "step 3/8: a/loss 2.5\n"
    status = look(home, attempt(home, "1_0", log=log, ending="75 1 node3"), _0=RUNNING)
    assert (status.state, status.word, status.node, status.restarts) == (
        State.RUNNING,
        "RUNNING",
        "node7",
        2,
    )
    assert status.said == "step 3/8: a/loss 2.5"


def test_a_waiting_job_says_why(home: Path) -> None:
    assert (
        look(
            home, attempt(home, "1_0"), _0=ScheduledJob(State.PENDING, "PENDING", reason="Priority")
        ).said
        == "Priority"
    )


def test_of_several_jobs_the_last_counts(home: Path) -> None:
    failed = attempt(home, "1_0", log="error: no images\n", ending="1 0 n")
    assert look(home, failed).said == "error: no images"
    assert (
        look(home, failed, attempt(home, "1_4"), _4=ScheduledJob(State.PENDING, "PENDING")).state
        is State.PENDING
    )
    assert look(home, failed, attempt(home, "1_4", ending="75 3 node1"))[:4] == (
        State.STOPPED,
        "",
        "node1",
        3,
    )


def test_the_run_folder_is_the_one_that_the_log_names_also_while_a_new_job_has_said_nothing(
    home: Path,
) -> None:
    first = attempt(home, "1_0", log=run_folder(home), ending="1 0 n")
    status = look(home, first, attempt(home, "1_1"), _1=RUNNING)
    assert status.run == home.parents[1] / "runs/distill/x"
    assert look(home, attempt(home, "1_1"), _1=RUNNING).run is None


def test_never_submitted_is_new(home: Path) -> None:
    assert look(home).state is State.NEW


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "step 1\n"
            "error: data.root=x does not exist\n"
            "srun: error: node1: task 0: Exited with exit code 1\n",
            "error: data.root=x does not exist",
        ),
        (
            "error (rank 1): cannot decode image 4\nsrun: error: ...\n",
            "error (rank 1): cannot decode image 4",
        ),
        (
            "Traceback (most recent call last):\n"
            "  File\n"
            "torch.OutOfMemoryError: CUDA out of memory\n",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        (
            "step 9\n"
            "slurmstepd: error: *** JOB 5 DUE TO TIME LIMIT ***\n"
            "srun: error: task 0: Killed\n",
            "slurmstepd: error: *** JOB 5 DUE TO TIME LIMIT ***",
        ),
        (
            "step 9\nsrun: error: task 0: Killed\nsrun: Force Terminated\n",
            "srun: error: task 0: Killed",
        ),
        ("step 8\nstep 9\n\n", "step 9"),
        ("", ""),
    ],
)
def test_of_a_failed_log_the_line_that_says_why_is_shown(
    tmp_path: Path, log: str, expected: str
) -> None:
    (tmp_path / "log").write_text(log)
    assert error_line(tmp_path / "log") == expected


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("é" * 100_000 + "\nlast\n")
    assert last_line(tmp_path / "log") == "last"
    assert last_line(tmp_path / "absent") == ""
    (tmp_path / "log").write_text(
        "job 1_0 is requeued\nsrun: Force Terminated StepId=2.0\nslurmstepd-n: error: x\n"
    )
    assert last_line(tmp_path / "log") == "job 1_0 is requeued"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            {"step": 50, "num_steps": 200, "loss": 3.0, "images_per_s": 100, "seconds_left": 48.0},
        ),
        (
            {"steps": 80},
            {"step": 50, "num_steps": 80, "loss": 3.0, "images_per_s": 100, "seconds_left": 9.6},
        ),
        ({"batch_size": "auto"}, {"step": 50, "num_steps": 200, "loss": 3.0, "images_per_s": 100}),
    ],
)
def test_progress_is_what_the_run_folder_says(
    tmp_path: Path, options: dict[str, Any], expected: dict[str, float]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"options": OPTIONS | options}))
    assert progress_of(tmp_path) == {}
    lines = [
        {"step": 40, "epoch": 2.0, "a/loss": 9},
        {"step": 50, "epoch": 2.5, "a/loss": 2.0, "b/loss": 4.0},
        {"step": 50, "a/knn10": 9},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 60, "epo'
    )
    (tmp_path / "speed.jsonl").write_text('{"step": 50, "images_per_s": 100}\n')
    assert progress_of(tmp_path) == expected


def test_a_cell_is_read_as_it_was_written(home: Path) -> None:
    cell = Cell("1a2b", "distill", ["seed=1", "data.root=a b"], [attempt(home, "1_0")])
    save_cell(home, cell)
    assert load_cell(home, "1a2b") == cell
    assert load_cell(home, "3c4d") is None


def test_cells_are_labelled_with_what_sets_them_apart() -> None:
    assert labels([["epochs=2", "seed=0", "student=a"], ["epochs=2", "seed=1", "student=a"]]) == [
        "seed=0",
        "seed=1",
    ]
    assert labels([["epochs=2", "seed=0"]]) == ["epochs=2 seed=0"]
