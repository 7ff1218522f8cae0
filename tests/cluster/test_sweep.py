"""`python -m seed_exp.sweep` with stand-ins for SLURM's tools.

Checks what is submitted, what is never submitted, and what is shown.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from seed_exp import sweep
from seed_exp.cluster import submission
from seed_exp.config.options import MAY_CHANGE
from seed_exp.tools import sweep_actions

GRID = ["data=digits", "views=digits", "student=convnet_w2", "tracker=files", "steps=4"]
SEEDS = [*GRID, "seed=0,1,2"]

SBATCH = """\
sleep 0.2
job=$((100 + $(ls {lab}/jobs | wc -l)))
cp "${{@: -1}}" {lab}/jobs/$job
echo $job"""
SQUEUE = "cat {lab}/queue"
SCANCEL = 'echo "$@" >>{lab}/cancelled'


class Lab:
    """A SLURM that takes jobs and never runs them; the test says what becomes of each."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "lab"
        (self.folder / "jobs").mkdir(parents=True)
        (self.folder / "bin").mkdir()
        for name, script in {"sbatch": SBATCH, "squeue": SQUEUE, "scancel": SCANCEL}.items():
            self.tool(name, script.format(lab=self.folder))
        self.queue()

    def tool(self, name: str, script: str) -> None:
        (self.folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def queue(self, *lines: str) -> None:
        """Sets the answer that squeue gives from now on."""
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    @property
    def submitted(self) -> list[str]:
        """The scripts of all jobs."""
        return [path.read_text() for path in sorted((self.folder / "jobs").iterdir())]

    def logs(self) -> Path:
        (folder,) = self.home.glob("runs/sweeps/*/logs")
        return folder

    def ended(self, job: str, status: int, log: str) -> None:
        """A job leaves the queue."""
        (self.logs() / f"{job}.log").write_text(log)
        (self.logs() / f"{job}.exit").write_text(f"{status} 0 node1\n")

    def finished(self, job: str) -> Path:
        run = self.home / "runs/distill" / job
        (run / "results").mkdir(parents=True)
        (run / "done.json").write_text("{}")
        options = {"steps": 4, "epochs": 1, "batch_size": 8, "students": {"convnet_w2": {}}}
        (run / "config.json").write_text(json.dumps({"options": options}))
        lines = [
            {"step": 4, "epoch": 0.1, "convnet_w2/loss": 2.5},
            {"step": 4, "convnet_w2/knn10": 61.5},
        ]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        results = {"evaluation": "knn", "results": {"convnet_w2": {"knn10_majority": 63.0}}}
        (run / "results" / "knn-1.json").write_text(json.dumps(results))
        (self.logs() / f"{job}.run").write_text(json.dumps({"run": f"runs/distill/{job}"}))
        self.ended(job, 0, "done\n")
        return run


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    lab = Lab(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{lab.folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for name in list(os.environ):
        if name.startswith(("SEED_SLURM", "HYDRA_FULL_ERROR")):
            monkeypatch.delenv(name)
    return lab


Call = Callable[..., str]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command; returns what it printed."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
        sweep.main()
        return capsys.readouterr().out

    return call


def states(call: Call, *words: str) -> list[str]:
    (found,) = json.loads(call("status", *words, "--json"))
    return [cell["state"] for cell in found["cells"]]


def test_the_whole_grid_is_one_array_of_a_snapshot(lab: Lab, call: Call) -> None:
    printed = call("submit", *SEEDS, "--parallel", "2", "hydra.launcher.partition=gpu")
    (script,) = lab.submitted
    assert "#SBATCH --array=0-2%2\n" in script
    assert "#SBATCH --partition=gpu\n" in script
    for number in range(3):
        assert (
            f"  {number}) cell=(distill {' '.join(GRID)} seed={number}) ;; # seed={number}\n"
            in script
        )
    (snapshot,) = (lab.home / "runs/sweeps/snapshots").iterdir()
    assert f"{sys.executable} {snapshot} " in script
    assert (snapshot / "conf/distill.yaml").exists()
    assert (
        lab.logs()
    ).is_dir()  # SLURM writes no logs into a folder that is not there, and says nothing
    recorded = json.loads((lab.logs().parent / "sweep.json").read_text())
    assert recorded["submissions"][0].keys() == {
        "job",
        "script",
        "time",
        "snapshot",
        "git",
        "cells",
        "request",
    }
    assert "submitted as job 100" in printed
    assert "sweep status data=digits" in printed


def test_a_dry_run_prints_the_script_and_touches_nothing(lab: Lab, call: Call) -> None:
    printed = call("submit", *SEEDS, "--dry-run")
    assert lab.submitted == []
    assert not (lab.home / "runs").exists()
    call("submit", *SEEDS)
    assert lab.submitted[0] in printed


def test_a_cell_is_never_submitted_twice(lab: Lab, call: Call) -> None:
    call("submit", *SEEDS)
    lab.queue(
        "100_0|RUNNING|node1|0|None|", "100_1|PENDING||0|Priority|", "100_2|PENDING||0|Priority|"
    )
    assert "nothing to submit" in call("submit", *SEEDS)
    assert "nothing to retry" in call("retry", *SEEDS)
    lab.queue()
    lab.finished("100_0")
    lab.ended("100_1", 1, "error: x\n")
    assert "nothing to submit" in call("submit", *SEEDS)
    assert len(lab.submitted) == 1


def test_two_submissions_at_the_same_time_are_one(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep", "submit", *SEEDS])
    both = [multiprocessing.get_context("fork").Process(target=sweep.main) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(lab.submitted) == 1


def test_more_seeds_submit_only_what_is_new_and_another_order_is_the_same_sweep(
    lab: Lab, call: Call
) -> None:
    call("submit", *SEEDS)
    lab.queue(*(f"100_{number}|RUNNING|n|0|None|" for number in range(3)))
    assert "nothing to submit" in call("submit", *reversed(SEEDS))
    call("submit", *GRID, "seed=0,1,2,3")
    assert len(lab.submitted) == 2
    assert "#SBATCH --array=0-0%256\n" in lab.submitted[1]
    assert "seed=3)" in lab.submitted[1]
    lab.queue(
        *(f"100_{number}|RUNNING|n|0|None|" for number in range(3)), "101_0|PENDING||0|Priority|"
    )
    assert states(call, *GRID, "seed=0,1,2,3") == ["RUNNING"] * 3 + ["PENDING"]
    assert states(call, *SEEDS) == ["RUNNING"] * 3


def test_what_changes_no_result_does_not_make_another_cell(lab: Lab, call: Call) -> None:
    call("submit", *SEEDS)
    lab.ended("100_0", 1, "error: x\n")
    assert "data.num_workers" in MAY_CHANGE
    call("retry", *SEEDS, "data.num_workers=0", "--cell", "0")
    assert "seed=0 data.num_workers=0)" in lab.submitted[1]


def test_retry_submits_what_ended_without_being_finished(lab: Lab, call: Call) -> None:
    call("submit", *SEEDS)
    lab.finished("100_0")
    lab.ended("100_1", 1, "1437 images\nerror: no images\n")
    lab.queue("100_2|RUNNING|node1|0|None|")
    assert states(call, *SEEDS) == ["FINISHED", "FAILED", "RUNNING"]
    assert "1: error: no images" in call("status", *SEEDS)
    assert "  1 seed=1\n" in call("retry", *SEEDS)
    assert "seed=1)" in lab.submitted[1]
    assert "seed=0)" not in lab.submitted[1]
    lab.queue("100_2|RUNNING|node1|0|None|", "101_0|PENDING||0|Priority|")
    assert states(call, *SEEDS) == ["FINISHED", "PENDING", "RUNNING"]
    lab.queue()
    assert states(call, *SEEDS) == ["FINISHED", "UNKNOWN", "UNKNOWN"]  # gone without a word
    assert "  1 seed=1\n  2 seed=2\n" in call("retry", *SEEDS)


def test_cancel_cancels_what_is_active_of_the_cells_named(lab: Lab, call: Call) -> None:
    call("submit", *SEEDS)
    lab.queue(*(f"100_{number}|RUNNING|n|0|None|" for number in range(3)))
    assert (
        call("cancel", *SEEDS, "--cell", "1", "--cell", "seed=2")
        == "cancelled 1 seed=1\ncancelled 2 seed=2\n"
    )
    assert (lab.folder / "cancelled").read_text() == "--quiet 100_1 100_2\n"
    lab.queue("100_0|RUNNING|n|0|None|")
    assert states(call, *SEEDS) == ["RUNNING", "CANCELLED", "CANCELLED"]
    with pytest.raises(SystemExit, match="the sweep has no cell 'seed=7'; did you mean"):
        call("cancel", *SEEDS, "--cell", "seed=7")


def test_an_edited_experiment_makes_new_cells_and_keeps_those_that_still_run(
    lab: Lab, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = iter([["lr=1", "lr=2"], ["lr=2", "lr=3"]])
    monkeypatch.setattr(
        "seed_exp.cluster.grid.jobs",
        lambda *_: [[*GRID, f"optimizer.{option}"] for option in next(grids)],
    )
    call("submit", "experiments=table1_moco_v2_r50")
    lab.queue("100_0|RUNNING|n|0|None|", "100_1|RUNNING|n|0|None|")
    call("submit", "experiments=table1_moco_v2_r50")
    assert "optimizer.lr=3)" in lab.submitted[1]
    assert "array=0-0%" in lab.submitted[1]
    lab.queue("100_0|RUNNING|n|0|None|", "100_1|RUNNING|n|0|None|", "101_0|RUNNING|n|0|None|")
    (found,) = json.loads(call("status", "experiments=table1_moco_v2_r50", "--json"))
    assert [cell["label"] for cell in found["cells"]] == [
        "optimizer.lr=2",
        "optimizer.lr=3",
        "optimizer.lr=1",
    ]


def test_finished_cells_need_no_slurm(lab: Lab, call: Call) -> None:
    call("submit", *SEEDS)
    for number in range(3):
        lab.finished(f"100_{number}")
    lab.tool("squeue", "exit 1")
    assert states(call, *SEEDS) == ["FINISHED"] * 3


def test_collect_gathers_every_number_and_names_what_is_missing(
    lab: Lab, call: Call, tmp_path: Path
) -> None:
    call("submit", *SEEDS)
    lab.finished("100_0")
    lab.ended("100_1", 1, "error: x\n")
    lab.queue("100_2|PENDING||0|Priority|")
    printed = call("collect", *SEEDS)
    assert re.search(
        r"\| 0 seed=0 \| FINISHED \| convnet_w2 \|  2.5 \|  61.5 \| +63 \| "
        r"\S*runs/distill/100_0 \|",
        printed,
    )
    assert printed.endswith("1 of 3 cells are finished\n1 seed=1 is FAILED\n2 seed=2 is PENDING\n")
    call("collect", *SEEDS, "--output", "all.csv")
    where = "runs/distill/100_0"
    assert Path("all.csv").read_text().splitlines() == [
        "cell,label,state,run,source,name,value",
        f"0,seed=0,FINISHED,{where},metrics,step,4",
        f"0,seed=0,FINISHED,{where},metrics,epoch,0.1",
        f"0,seed=0,FINISHED,{where},metrics,convnet_w2/loss,2.5",
        f"0,seed=0,FINISHED,{where},metrics,convnet_w2/knn10,61.5",
        f"0,seed=0,FINISHED,{where},knn,convnet_w2/knn10_majority,63.0",
        "1,seed=1,FAILED,,,,",
        "2,seed=2,PENDING,,,,",
    ]
    call("collect", *SEEDS, "--output", "all.json")
    cells: list[dict[str, Any]] = json.loads(Path("all.json").read_text())["cells"]
    assert [cell["run"] for cell in cells] == [where, None, None]
    assert cells[0]["results"][0]["results"] == {"convnet_w2": {"knn10_majority": 63.0}}
    assert cells[0]["options"]["steps"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", *SEEDS], "was submitted here; runs/sweeps is empty"),
        (["submit", *GRID, "sed=0,1"], "no option 'sed'; did you mean 'seed'?"),
        (["submit", *GRID, "students.convnet_w2.hidden_dim=-1,-2"], "must be"),
        (["submit", *SEEDS, "run_dir=x"], "run_dir=x would be the folder of 3 cells"),
        (["submit", *GRID, "log_every=1,2"], "compute the same"),
        (["submit", *SEEDS, "hydra/launcher=slurm"], "with --launcher slurm"),
        (
            ["submit", *SEEDS, "--launcher", "slrum"],
            "unknown launcher 'slrum'; did you mean 'slurm'?",
        ),
        (["submit", *SEEDS, "hydra.launcher.partitoin=x"], "partitoin"),
        (["submit", *SEEDS, "--gpus", "2"], "--gpus is for --launcher local"),
        (
            ["submit", *SEEDS, "teacher.checkpoint=https://a:secret1234@b/c"],
            "teacher.checkpoint='${oc.env:NAME}'",
        ),
        (["sbumit"], "did you mean 'submit'?"),
        (["collect", *SEEDS, "--output", "x.txt"], "must end in .json or .csv"),
        (["status", *SEEDS, "--dry-run"], "unrecognized arguments: --dry-run"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    lab: Lab, call: Call, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert str(ended.value).startswith("error: ")
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)
    assert "secret1234" not in str(ended.value)
    assert lab.submitted == []


def test_a_refusal_of_slurm_is_shown_and_nothing_counts_as_submitted(lab: Lab, call: Call) -> None:
    works = (lab.folder / "bin/sbatch").read_text()
    lab.tool("sbatch", "echo 'sbatch: error: invalid partition specified: gpuu' >&2; exit 1")
    with pytest.raises(
        SystemExit,
        match=r"^error: sbatch failed: sbatch: error: invalid partition specified: gpuu$",
    ):
        call("submit", *SEEDS)
    (lab.folder / "bin/sbatch").write_text(works)
    call("submit", *SEEDS)
    lab.tool(
        "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    for action in ("submit", "retry", "status", "cancel", "collect"):
        with pytest.raises(SystemExit, match=r"^error: squeue failed: .*Unable to contact"):
            call(action, *SEEDS)


def test_without_slurm_the_line_is_for_this_machine_unless_slurm_was_asked_for(
    lab: Lab, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(lab.folder / "bin")
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "sbatch" else which(name))
    monkeypatch.setenv("PATH", "/nowhere")
    printed = call("submit", *SEEDS, "--dry-run")
    assert printed.startswith("no SLURM here (no sbatch on PATH): --launcher local\n")
    assert "#SBATCH" not in printed
    with pytest.raises(
        SystemExit, match=r"^error: no sbatch on this machine: .* or use --launcher local$"
    ):
        call("submit", *SEEDS, "--launcher", "slurm")


def test_status_without_options_shows_every_sweep(lab: Lab, call: Call) -> None:
    call("submit", *SEEDS)
    call("submit", *GRID, "seed=5", "--command", "pretrain", "views.crops.global.num=2")
    printed = call("status")
    assert printed.count("cells, ") == 2
    assert "pretrain-" in printed


def test_script_copy_and_record_agree_though_code_is_edited_meanwhile(
    lab: Lab, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (f"{number:012}" for number in range(100))
    monkeypatch.setattr(submission, "snapshot_name", lambda code: next(names))
    call("submit", *SEEDS)
    (copy,) = (lab.home / "runs/sweeps/snapshots").iterdir()
    assert str(copy) in lab.submitted[0]
    (recorded,) = json.loads((lab.logs().parent / "sweep.json").read_text())["submissions"]
    assert recorded["snapshot"] == copy.name


def test_a_retry_asks_for_what_was_asked_for_before(
    lab: Lab, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(
        "submit",
        *SEEDS,
        "--launcher",
        "slurm_8gpu",
        "--parallel",
        "2",
        "hydra.launcher.partition=a100",
        "hydra.launcher.nodes=2",
    )
    lab.ended("100_1", 1, "error: something\n")
    for number in (0, 2):
        lab.finished(f"100_{number}")
    call("retry", *SEEDS, "hydra.launcher.nodes=3")
    lab.ended("101_0", 1, "error: something\n")
    call("retry", *SEEDS, "--parallel", "7")
    lab.ended("102_0", 1, "error: something\n")
    for job, parallel in {1: 2, 2: 7}.items():
        asked = ["--partition=a100", "--ntasks-per-node=8", "--nodes=3", f"--array=0-0%{parallel}"]
        assert [option for option in asked if f"#SBATCH {option}\n" not in lab.submitted[job]] == []
    with monkeypatch.context() as patch:
        planned: list[int] = []
        patch.setattr(
            sweep_actions, "print_plan", lambda command, words, gpus: planned.append(gpus)
        )
        call("retry", *SEEDS, "--plan", "--dry-run")
        call("submit", *SEEDS, "--plan", "--dry-run", "--launcher", "local", "--gpus", "4")
        assert planned == [3 * 8, 4]
    other = call("retry", *SEEDS, "--launcher", "slurm", "--dry-run")
    assert "a100" not in other
    assert "#SBATCH --nodes=1\n" in other


@pytest.mark.parametrize("profile", ["slurm", "slurm_8gpu", "slurm_2node"])
def test_every_profile_becomes_a_script(
    lab: Lab, call: Call, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEED_SLURM_PARTITION", "a100")
    printed = call("submit", *SEEDS, "--dry-run", "--launcher", profile)
    assert "#SBATCH --partition=a100\n" in printed
    num_tasks = {"slurm": 1, "slurm_8gpu": 8, "slurm_2node": 8}[profile]
    assert f"#SBATCH --ntasks-per-node={num_tasks}\n" in printed
    assert f"#SBATCH --nodes={2 if profile == 'slurm_2node' else 1}\n" in printed
    assert "#SBATCH --signal=USR2@120\n" in printed
    assert "srun --kill-on-bad-exit=1 " in printed


def test_watching_ends_when_nothing_is_active_and_is_plain_where_there_is_no_terminal(
    lab: Lab, call: Call
) -> None:
    call("submit", *SEEDS)
    for number in range(3):
        lab.finished(f"100_{number}")
    printed = call("status", *SEEDS, "--watch", "1")
    assert printed.count("3 FINISHED") == 1
    assert "\x1b" not in printed


@pytest.mark.slow
def test_without_slurm_cells_train_in_the_background_and_finish(
    lab: Lab, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = [
        "data=digits",
        "views=digits",
        "views.crops.global.num=2",
        "student=convnet_w2",
        "tracker=files",
        "device=cpu",
    ]
    options += [
        "data.num_workers=0",
        "batch_size=32",
        "moco.queue_size=64",
        "steps=4",
        "--command",
        "pretrain",
    ]
    line = [*options, "seed=0,1", "students.convnet_w2.init=null,absent.safetensors"]
    call("submit", *line, "--launcher", "local", "--parallel", "2")
    for _ in range(120):
        if not {"PENDING", "RUNNING"} & set(states(call, *line)):
            break
        time.sleep(1)
    assert states(call, *line) == ["FINISHED", "FAILED", "FINISHED", "FAILED"], call(
        "status", *line
    )
    assert "1: error: no checkpoint file absent.safetensors" in call("status", *line)
    assert len(list(lab.home.glob("runs/pretrain/*/done.json"))) == 2
