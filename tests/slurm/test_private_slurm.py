"""The cluster of the tests is one: jobs run on its two nodes, and GPUs are handed out."""

from __future__ import annotations

from pathlib import Path

import pytest
from private_slurm import PrivateSlurm

pytestmark = pytest.mark.slurm


def test_a_job_runs_on_both_nodes_and_sees_the_gpus_it_asked_for(
    slurm: PrivateSlurm, tmp_path: Path
) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\nsrun bash -c 'echo $SLURMD_NODENAME $SLURM_PROCID $CUDA_VISIBLE_DEVICES'\n"
    )
    slurm.run(
        "sbatch",
        "--wait",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=2",
        "--output=out",
        script,
        cwd=tmp_path,
    )
    assert sorted((tmp_path / "out").read_text().splitlines()) == [
        "127.0.0.1 0 0,1",
        "127.0.0.2 1 0,1",
    ]


def test_it_keeps_no_accounts(slurm: PrivateSlurm) -> None:
    assert slurm.run("sacct", check=False).returncode != 0
