from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
import tiny

from seed_exp.base.slurm import requeues
from seed_exp.base.stopping import Stopped


class Warned:
    """An evaluation that takes longer than a scheduler waits, and in which the warning comes."""

    def __init__(self) -> None:
        self.began: float | None = None

    def __call__(self, names: Collection[str]) -> Mapping[str, float]:
        if self.began is None:
            self.began = time.monotonic()
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(60)
        return {"score": 1.0}


def test_a_warning_during_the_evaluation_does_not_wait_for_its_end(
    tmp_path: Path, logged: list[str]
) -> None:
    evaluate = Warned()
    with pytest.raises(Stopped) as stopped:
        tiny.train(tiny.seed(), tmp_path, evaluate=evaluate)
    assert (stopped.value.folder, stopped.value.step, stopped.value.signal_name) == (
        tmp_path,
        5,
        "SIGUSR2",
    )
    assert tiny.last_checkpoint(tmp_path)["step"] == 5
    tiny.train(tiny.seed(), tmp_path, evaluate=evaluate)  # evaluates step 5 first
    tiny.train(tiny.seed(), tmp_path / "straight", evaluate=lambda _: {"score": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == (
        tmp_path / "straight" / "metrics.jsonl"
    ).read_bytes()
    tiny.assert_same(tiny.last_checkpoint(tmp_path), tiny.last_checkpoint(tmp_path / "straight"))


def test_a_run_that_slurm_started_again_notes_it_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    tiny.train(tiny.seed(), tmp_path, tiny.fit_config(steps=4))
    assert requeues(tmp_path) == []
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tiny.train(tiny.seed(), tmp_path)
    assert [(line["restart"], line["step"]) for line in requeues(tmp_path)] == [(1, 4)]
