"""Two processes started for one run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks

OPTIONS = ["data=digits", "data.num_workers=0", "device=cpu", "views=digits", "batch_size=32"]
OPTIONS += ["student=convnet_w2", "moco.queue_size=64", "steps=2", "tracker=files", "run_dir=run"]
OPTIONS += ["knn_bank_size=50", "knn_query_size=50"]
OPTIONS += ['evaluations=["knn ks=[5]","linear views=linear_digits epochs=1 lrs=[1]"]']


def start(home: Path) -> subprocess.Popen[str]:
    return forks.Popen(
        [sys.executable, "-m", "seed_exp.pretrain", *OPTIONS],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_one_is_refused_during_the_evaluations_and_the_first_one_finishes(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    first = start(tmp_path)
    try:
        while not list(run.glob("linear/*/config.json")):
            assert first.poll() is None, first.communicate()
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)  # so that the second one surely comes in time
        assert not (run / "done.json").exists()
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        second = start(tmp_path)
        _, said = second.communicate(timeout=300)
        assert second.returncode == 1
        (line,) = said.strip().splitlines()
        assert line.startswith(f"error: run is in use by process {first.pid} on ")
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        os.kill(first.pid, signal.SIGCONT)
        _, said = first.communicate(timeout=300)
        assert first.returncode == 0, said
    finally:
        first.kill()
    assert (run / "done.json").exists()
    assert {path.name.partition("-")[0] for path in (run / "results").iterdir()} == {
        "knn",
        "linear",
    }
    (evaluation,) = (run / "linear").iterdir()
    assert "resuming" not in (evaluation / "log.txt").read_text()
