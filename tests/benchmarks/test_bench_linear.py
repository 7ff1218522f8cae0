from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from seed_exp.benchmarks import bench_linear
from seed_exp.benchmarks.measure import BenchRow, Contender
from seed_exp.config.compose import compose
from seed_exp.models.students import Student

LINE = [
    "bench=linear",
    "student=convnet_w2",
    "views=linear_digits",
    "batch_size=4",
    "device=cpu",
    "seconds=0",
]


def test_features_are_extracted_once_for_all_rates_and_otherwise_once_per_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    calls: dict[str, list[int]] = {}
    build, interleave = bench_linear.build_student, bench_linear.interleave

    def watched_student(*args: Any) -> Student:
        student = build(*args)
        student.encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        return student

    def watched(
        contenders: Sequence[Contender], *, seconds: float, device: torch.device
    ) -> list[BenchRow]:
        for contender in contenders:
            seen.clear()
            contender.run()
            calls[contender.name] = seen.copy()
        return interleave(contenders, seconds=seconds, device=device)

    monkeypatch.setattr(bench_linear, "build_student", watched_student)
    monkeypatch.setattr(bench_linear, "interleave", watched)
    bench_linear.bench(compose("bench", LINE))
    assert calls == {
        "one evaluation per rate": [4] * len(bench_linear.LRS),
        "ours, all rates at once": [4],
        "features": [4],
    }


def test_several_students_are_refused() -> None:
    with pytest.raises(
        ValueError, match="bench=linear measures one student, got convnet_w2, convnet_w32"
    ):
        bench_linear.bench(compose("bench", [*LINE, "student=[convnet_w2,convnet_w32]"]))
