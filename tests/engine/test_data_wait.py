"""The time that `fit` counts as waiting for data."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from torch import Tensor

from seed_exp.engine import progress
from seed_exp.engine.fleet import Fleet


def test_a_run_tells_what_share_of_its_time_the_images_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)

    class Slow(tiny.Images):
        def image(self, index: int) -> Tensor:
            clock.now += 1
            return super().image(index)

    class SlowFleet(Fleet):
        def step(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            clock.now += 3 * 8
            return super().step(*args, **kwargs)

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr("seed_exp.engine.fit.Fleet", SlowFleet)
    tiny.train(tiny.seed(), tmp_path, source=Slow())
    told = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [row["data_wait_percent"] for row in told] == [25.0] * 4
    assert [row["images_per_s"] for row in told] == [8 / 32] * 4
