"""The script of a submission runs the right cell exactly as given, and records how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from seed_exp.cluster.script import Places, local_script, slurm_script
from seed_exp.cluster.sweep_cells import Cell

ODD = [
    "student=[a,b]",
    "data.root='/a b/$(touch never)'",
    'x="quoted" `id` \\ ; # & é',
    "teacher.checkpoint=${oc.env:HOME}",
    "y=!1",
]
CELLS = [
    ("seed=0", Cell("a", "pretrain", ["seed=0"])),
    ("odd\nlabel ;;", Cell("b", "distill", ODD)),
]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Places whose interpreter prints its arguments and folder, and ends with status $STATUS."""
    logs, cwd = tmp_path / "with space" / "logs", tmp_path / "with space" / "cwd"
    logs.mkdir(parents=True)
    cwd.mkdir()
    python = tmp_path / "python"
    code = [
        "import json, os, sys, time",
        "print(json.dumps([os.getcwd(), *sys.argv[1:]]), flush=True)",
    ]
    code += [
        "time.sleep(float(os.environ.get('SLEEP', 0)))",
        "sys.exit(int(os.environ.get('STATUS', 0)))",
    ]
    python.write_text("\n".join([f"#!{sys.executable}", *code]))
    python.chmod(0o755)
    return Places(python, tmp_path / "a snapshot", logs, cwd)


def run(text: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **env}
    return subprocess.run(
        ["bash", "-c", text, "script", *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("number", [0, 1])
def test_each_number_is_its_cell_with_every_character_as_given(places: Places, number: int) -> None:
    cell = CELLS[number][1]
    done = run(local_script(CELLS, places, tasks=1), str(number), SWEEP_JOB="local-1")
    assert done.stderr == ""
    assert json.loads(done.stdout) == [
        str(places.cwd),
        str(places.snapshot),
        cell.command,
        *cell.overrides,
    ]
    assert [path.name for path in places.logs.iterdir()] == [f"local-1_{number}.exit"]
    assert not list(places.cwd.iterdir())


def test_a_number_without_a_cell_is_an_error(places: Places) -> None:
    done = run(local_script(CELLS, places, tasks=1), "2", SWEEP_JOB="local-1")
    assert (done.returncode, done.stderr) == (2, "error: there is no cell 2 in this submission\n")


@pytest.mark.parametrize("status", ["0", "1", "75"])
def test_the_exit_status_is_passed_on_and_kept(places: Places, status: str) -> None:
    (places.logs / "j_0.exit").write_text("99 7 of-the-start-before")
    env = {
        "SWEEP_JOB": "j",
        "STATUS": status,
        "SLURM_RESTART_COUNT": "3",
        "SLURMD_NODENAME": "node1",
    }
    assert run(local_script(CELLS, places, tasks=1), "0", **env).returncode == int(status)
    assert (places.logs / "j_0.exit").read_text() == f"{status} 3 node1\n"


def test_sigterm_does_not_keep_it_from_writing_how_the_run_ended(places: Places) -> None:
    env = {**os.environ, "SWEEP_JOB": "j", "STATUS": "75", "SLEEP": "1"}
    script = ["bash", "-c", local_script(CELLS, places, tasks=1), "script", "0"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    assert (places.logs / "j_0.exit").read_text().startswith("75 0 ")


def test_a_script_for_several_gpus_starts_a_process_for_each(places: Places) -> None:
    given = json.loads(run(local_script(CELLS, places, tasks=4), "0", SWEEP_JOB="j").stdout)
    assert given[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]


def test_for_slurm_it_is_an_array_with_a_limit_and_the_profiles_options(
    places: Places, tmp_path: Path
) -> None:
    (tmp_path / "srun").write_text('#!/bin/bash\nshift 2\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    options = {
        "job-name": "table1",
        "gpus-per-node": "8",
        "time": "1440",
        "exclusive": "",
        "signal": "USR2@120",
    }
    setup = ["export A=1", "test $A = 1"]
    text = slurm_script(
        CELLS, places, options=options, parallel=3, setup=setup, srun=["--mpi=none"]
    )
    header = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert text.startswith(
        "#!/bin/bash\n#SBATCH "
    )  # sbatch reads its options only before the first command
    assert header == [
        "#SBATCH --array=0-1%3",
        f"#SBATCH --output='{places.logs}/%A_%a.log'",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        "#SBATCH --job-name=table1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=1440",
        "#SBATCH --exclusive",
        "#SBATCH --signal=USR2@120",
    ]
    env = {
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": "1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    done = run(text, **env)
    assert done.stderr == ""
    assert json.loads(done.stdout)[2:] == ["distill", *ODD]
    assert text.index("test $A = 1") < text.index("srun --kill-on-bad-exit=1 --mpi=none")
    assert (places.logs / "12_1.exit").exists()
