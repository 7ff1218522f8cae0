"""A launcher profile as options of sbatch; answers of SLURM's tools, and their failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from seed_exp.cluster import slurm_tools
from seed_exp.cluster.sweep_cells import ScheduledJob, State


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tools that is all there is on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def tool(tools: Path, name: str, script: str) -> None:
    (tools / name).write_text(f"#!/bin/bash\n{script}\n")
    (tools / name).chmod(0o755)


def test_options_of_a_profile_are_called_what_sbatch_calls_them() -> None:
    profile = {
        "_target_": "x.SlurmLauncher",
        "submitit_folder": "x",
        "name": "x",
        "max_num_timeout": 1000,
        "array_parallelism": 256,
        "setup": ["true"],
        "partition": "gpu",
        "nodes": 2,
        "tasks_per_node": 8,
        "gpus_per_node": 8,
        "mem_gb": 0,
        "timeout_min": 90,
        "signal_delay_s": 300,
        "qos": None,
        "additional_parameters": {
            "requeue": True,
            "exclusive": False,
            "mail-type": "FAIL",
            "mem-bind": 1,
        },
    }
    assert slurm_tools.sbatch_options(profile) == {
        "gpus-per-node": "8",
        "mail-type": "FAIL",
        "mem": "0G",
        "mem-bind": "1",
        "nodes": "2",
        "ntasks-per-node": "8",
        "partition": "gpu",
        "requeue": "",
        "signal": "USR2@300",
        "time": "90",
    }


def test_an_option_that_no_launcher_has_is_an_error_with_the_closest() -> None:
    with pytest.raises(
        ValueError,
        match=r"hydra.launcher.partitoin is no option of a SLURM job; did you mean 'partition'\?",
    ):
        slurm_tools.sbatch_options({"partitoin": "gpu"})


def test_squeue_is_read_whatever_the_fields_hold(tools: Path) -> None:
    lines = [
        "12_1|PENDING||0|Resources|",
        "12_0|RUNNING|node[1-2]|3|None|",
        "13|COMPLETING|node1|0|None|",
    ]
    lines += [
        "14_2|REQUEUED||1|BeginTime|",
        "15_0|PENDING||0|ReqNodeNotAvail, UnavailableNodes:n1|",
    ]
    tool(tools, "squeue", f"echo '{chr(10).join(lines)}'")
    assert slurm_tools.active() == {
        "12_1": ScheduledJob(State.PENDING, "PENDING", "", 0, "Resources"),
        "12_0": ScheduledJob(State.RUNNING, "RUNNING", "node[1-2]", 3, "None"),
        "13": ScheduledJob(State.RUNNING, "COMPLETING", "node1", 0, "None"),
        "14_2": ScheduledJob(State.PENDING, "REQUEUED", "", 1, "BeginTime"),
        "15_0": ScheduledJob(
            State.PENDING, "PENDING", "", 0, "ReqNodeNotAvail, UnavailableNodes:n1"
        ),
    }


def test_sbatch_gives_the_number_of_the_job_without_its_cluster(
    tools: Path, tmp_path: Path
) -> None:
    tool(tools, "sbatch", 'echo "77;lab"')
    assert slurm_tools.sbatch(tmp_path / "x.sh") == "77"


def test_nothing_to_cancel_asks_nobody(tools: Path) -> None:
    slurm_tools.scancel([])


def test_a_tool_that_is_absent_or_fails_is_one_line(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no sbatch on this machine: .* --launcher local"):
        slurm_tools.sbatch(tmp_path / "x.sh")
    said = [
        "sbatch: error: invalid partition specified: gpuu",
        "sbatch: error: Batch job submission failed",
    ]
    tool(tools, "sbatch", f"echo '{chr(10).join(said)}' >&2; exit 1")
    with pytest.raises(
        ValueError,
        match=r"^sbatch failed: .*invalid partition specified: gpuu; "
        r".*Batch job submission failed$",
    ):
        slurm_tools.sbatch(tmp_path / "x.sh")
    tool(tools, "squeue", "exit 3")
    with pytest.raises(ValueError, match=r"^squeue failed: exit status 3$"):
        slurm_tools.active()
    tool(tools, "squeue", "while :; do :; done")
    monkeypatch.setattr(slurm_tools, "TIMEOUT_S", 0.2)
    with pytest.raises(ValueError, match="squeue has not answered"):
        slurm_tools.active()
