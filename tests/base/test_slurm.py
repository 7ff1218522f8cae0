"""Questions to SLURM, and what follows from its answers.

The answers are real ones; `tests/slurm` gets them fresh.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from submitit.slurm.slurm import SlurmInfoWatcher

from seed_exp.base import slurm
from seed_exp.base.stopping import Stopped, stop_at_once
from seed_exp.data.loader import default_num_workers


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the tests out of any job that runs them."""
    for name in os.environ:
        if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)


class Controller:
    """A `scontrol` on PATH that shows one job and notes what else it was asked."""

    def __init__(self, folder: Path) -> None:
        self.answer, self.calls = folder / "answer", folder / "calls"
        self.calls.touch()
        script = folder / "scontrol"
        script.write_text(
            f'#!/bin/sh\ncase "$*" in *show*) cat {self.answer};; '
            f'*) echo "$*" >>{self.calls};; esac\n'
        )
        script.chmod(0o755)

    def shows(self, state: str, reason: str = "None", preempted: str = "None") -> None:
        line = (
            f"JobId=12 JobName=a b JobState={state} Reason={reason} Requeue=1 "
            f"PreemptTime={preempted} NodeList=n[1-2]"
        )
        self.answer.write_text(line)

    def asked(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Controller:
    found = Controller(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    found.shows("RUNNING")
    return found


# --- ranks ----------------------------------------------------------------------------------------

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
}


def test_a_task_of_a_step_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    found = slurm.torchrun_variables()
    port = found.pop("MASTER_PORT")
    assert 10_000 <= int(port) < 30_000
    ranks = {
        "RANK": "9",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu003",
    }
    assert found == ranks
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    assert slurm.torchrun_variables()["MASTER_PORT"] != port
    monkeypatch.setenv("MASTER_ADDR", "other")
    monkeypatch.setenv("MASTER_PORT", "7")
    assert slurm.torchrun_variables() == {**ranks, "MASTER_ADDR": "other", "MASTER_PORT": "7"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {
            "SLURM_JOB_ID": "1",
            "SLURM_NTASKS": "8",
            "SLURM_PROCID": "0",
        },  # the shell of salloc or sbatch
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {**STEP, "RANK": "3"},  # torchrun, started by srun
    ],
)
def test_other_processes_are_not(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert slurm.torchrun_variables() == {}


@pytest.mark.parametrize(
    ("environment", "usable", "own"),
    [
        ({}, 16, None),
        ({**STEP, "SLURM_CPUS_PER_TASK": "8"}, 64, 8),  # not bound to them
        ({**STEP, "SLURM_CPUS_PER_TASK": "8"}, 8, 8),  # bound
        ({**STEP, "SLURM_CPUS_ON_NODE": "64"}, 64, None),
        ({**STEP, "SLURM_CPUS_ON_NODE": "64"}, 8, 8),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "8"}, 8, None),
        (
            {**STEP, "SLURM_CPUS_PER_TASK": "8", "TORCHELASTIC_RUN_ID": "x"},
            8,
            None,
        ),  # torchrun's ranks in a task of srun
    ],
)
def test_a_task_of_a_step_knows_its_own_cores(
    environment: dict[str, str], usable: int, own: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert slurm.cores_of_task(usable) == own
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(usable)), raising=False)
    assert default_num_workers(8) == (own or usable // 8) - 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("gpu[7,9]", "gpu7"),
        ("rack[1-2]n[04-08]-ib,x", "rack1n04-ib"),
        ("127.0.0.[1-2]", "127.0.0.1"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


# --- requeueing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer", "reason"),
    [
        ("SIGUSR1", {"state": "RUNNING"}, "SIGUSR1"),
        ("SIGUSR2", {"state": "RUNNING"}, "SIGUSR2"),
        ("SIGTERM", {"state": "RUNNING"}, None),  # kill, or scancel --signal=TERM
        ("SIGTERM", {"state": "RUNNING", "preempted": "2026-11-23T09:58:10"}, "preempted"),
        ("SIGTERM", {"state": "COMPLETING", "reason": "TimeLimit"}, "time limit"),
        ("SIGTERM", {"state": "COMPLETING"}, None),  # scancel: a requeue would bring the job back
        ("SIGUSR2", {"state": "COMPLETING"}, None),  # scancel after the warning
        ("SIGINT", {"state": "RUNNING"}, None),
    ],
)
def test_what_is_started_again(
    name: str,
    answer: dict[str, str],
    reason: str | None,
    controller: Controller,
    tmp_path: Path,
    logged: list[str],
) -> None:
    controller.shows(**answer)
    slurm.requeue(name, tmp_path, 40)
    assert controller.asked() == ([] if reason is None else ["requeue 12"])
    found = [
        (line["job"], line["restart"], line["reason"], line["step"])
        for line in slurm.requeues(tmp_path)
    ]
    assert found == ([] if reason is None else [("12", 1, reason, 40)])
    assert len(logged) == 1


def test_of_an_array_only_its_task_is_started_again(
    controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    slurm.requeue("SIGUSR2", tmp_path, 1)
    assert controller.asked() == ["requeue 12_3"]


def test_outside_of_a_job_nobody_is_asked(
    controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    slurm.requeue("SIGUSR2", tmp_path, 1)
    assert controller.asked() == []


def test_a_warning_to_the_whole_step_does_not_end_the_question(
    controller: Controller, tmp_path: Path
) -> None:
    script = tmp_path / "scontrol"
    lines = script.read_text().partition("\n")[2]
    # Debian's sh unblocks all signals when it starts, bash none.
    script.write_text(f"#!/usr/bin/env bash\nkill -USR2 $$\n{lines}")
    slurm.requeue("SIGUSR2", None, None)
    assert controller.asked() == ["requeue 12"]


def test_a_controller_that_does_not_answer_is_no_error(
    controller: Controller, tmp_path: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\necho Unable to contact slurm controller >&2\nexit 1\n"
    )
    slurm.requeue("SIGUSR2", tmp_path, 1)
    monkeypatch.setenv("PATH", "")
    slurm.requeue("SIGUSR2", tmp_path, 1)
    assert [
        "could not be requeued (Unable to contact" in logged[0],
        "could not be requeued" in logged[1],
    ] == [True, True]
    assert slurm.requeues(tmp_path) == []


def test_a_job_without_progress_is_started_again_three_times(
    controller: Controller, tmp_path: Path
) -> None:
    for _ in range(3):
        slurm.requeue("SIGUSR2", tmp_path, 40)
    with pytest.raises(
        ValueError,
        match=r"job 12 is not requeued \(SIGUSR2\): it was at step 40 3 times in succession",
    ):
        slurm.requeue("SIGUSR2", tmp_path, 40)
    assert len(controller.asked()) == len(slurm.requeues(tmp_path)) == 3
    slurm.requeue("SIGUSR2", tmp_path, 41)
    slurm.requeue("SIGUSR2", tmp_path, 41)
    assert len(controller.asked()) == 5


def test_before_training_a_warning_counts_but_preemption_does_not(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    slurm.requeue("SIGUSR2", None, None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with pytest.raises(ValueError, match="it was before training began 3 times in succession"):
        slurm.requeue("SIGUSR2", None, None)
    controller.shows("RUNNING", preempted="2026-11-23T09:58:10")
    slurm.requeue("SIGTERM", None, None)
    assert len(controller.asked()) == 2


def test_restarts_by_slurm_itself_are_noted_once_and_counted(
    controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.note_restart(tmp_path, 0)
    assert slurm.requeues(tmp_path) == []
    slurm.requeue("SIGUSR2", tmp_path, 5)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    slurm.note_restart(tmp_path, 5)  # ours, and already written down
    for count in ("2", "3"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        slurm.note_restart(tmp_path, 5)
        slurm.note_restart(tmp_path, 5)
    assert [(line["restart"], line["reason"]) for line in slurm.requeues(tmp_path)] == [
        (1, "SIGUSR2"),
        (2, "by SLURM"),
        (3, "by SLURM"),
    ]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    with pytest.raises(ValueError, match=r"not requeued \(by SLURM\): it was at step 5 3 times"):
        slurm.note_restart(tmp_path, 5)
    slurm.note_restart(tmp_path, 6)
    assert json.loads((tmp_path / "requeues.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_a_line_that_was_cut_by_a_kill_costs_that_line_only(
    controller: Controller, tmp_path: Path
) -> None:
    slurm.requeue("SIGUSR2", tmp_path, 5)
    whole = (tmp_path / "requeues.jsonl").read_bytes()
    (tmp_path / "requeues.jsonl").write_bytes(whole + whole[: len(whole) // 2])
    assert [line["step"] for line in slurm.requeues(tmp_path)] == [5]
    slurm.requeue("SIGUSR2", tmp_path, 7)
    assert [line["step"] for line in slurm.requeues(tmp_path)] == [5, 7]


# --- signals outside of training ------------------------------------------------------------------


def interrupted(closed: list[str]) -> None:
    with stop_at_once():
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            closed.append("files")


def test_a_warning_ends_what_is_no_training_at_once_and_a_second_lets_it_close_its_files() -> None:
    before, closed = signal.getsignal(signal.SIGUSR2), []
    with pytest.raises(Stopped) as stopped:
        interrupted(closed)
    assert (stopped.value.code, stopped.value.signal_name, stopped.value.folder, closed) == (
        75,
        "SIGUSR2",
        None,
        ["files"],
    )
    assert signal.getsignal(signal.SIGUSR2) is before


# --- accounts -------------------------------------------------------------------------------------


def test_submitit_reads_the_states_of_jobs_from_scontrol(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = "JobId={} ArrayJobId=12 ArrayTaskId={} JobName=a JobState={} NodeList=n1"
    answers = [
        array.format(12, "4-5%1", "PENDING"),
        array.format(14, "3", "RUNNING"),
        array.format(13, "2", "COMPLETED"),
    ]
    controller.answer.write_text("\n".join(answers))
    found = SlurmInfoWatcher().read_info("\n".join(slurm.accounts(["12"])))
    states = {task: found[f"12_{task}"]["State"] for task in range(6)}
    # 0 and 1 ended so long ago that SLURM knows them no more.
    assert states == {
        0: "ENDED",
        1: "ENDED",
        2: "COMPLETED",
        3: "RUNNING",
        4: "PENDING",
        5: "PENDING",
    }
    controller.shows("FAILED")
    assert (
        SlurmInfoWatcher().read_info("\n".join(slurm.accounts(["12"])))["12"]["State"] == "FAILED"
    )


def test_a_job_that_slurm_has_forgotten_has_ended_and_one_it_cannot_be_asked_about_has_not(
    controller: Controller, tmp_path: Path
) -> None:
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\necho slurm_load_jobs error: Invalid job id specified >&2\nexit 1\n"
    )
    assert SlurmInfoWatcher().read_info("\n".join(slurm.accounts(["12"])))["12"]["State"] == "ENDED"
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\necho Unable to contact slurm controller >&2\nexit 1\n"
    )
    with pytest.raises(subprocess.CalledProcessError):
        list(slurm.accounts(["12"]))


def test_sacct_is_replaced_only_where_it_does_not_work(
    controller: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sacct = tmp_path / "sacct"
    sacct.write_text("#!/bin/sh\necho Slurm accounting storage is disabled >&2\nexit 1\n")
    sacct.chmod(0o755)
    with slurm.stand_in_for_sacct():
        asked = subprocess.run(
            ["sacct", "-o", "JobID,State", "-j", "12"], capture_output=True, text=True, check=True
        )
    assert asked.stdout.splitlines()[-1] == "12|RUNNING|n[1-2]"
    assert shutil.which("sacct") == str(sacct)
    sacct.write_text("#!/bin/sh\n")
    with slurm.stand_in_for_sacct():
        assert shutil.which("sacct") == str(sacct)
    sacct.unlink()
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with slurm.stand_in_for_sacct():
        assert shutil.which("sacct") is not None
