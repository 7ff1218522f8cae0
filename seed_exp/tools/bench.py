"""The benches by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from seed_exp.base.registry import lookup
from seed_exp.benchmarks import (
    bench_fleet,
    bench_knn,
    bench_latency,
    bench_linear,
    bench_loss,
    bench_scaling,
    bench_step,
    bench_views,
)
from seed_exp.benchmarks.measure import BenchReport, render, to_json
from seed_exp.config.schema import BenchConfig

BENCHES: dict[str, Callable[[BenchConfig], BenchReport]] = {
    "views": bench_views.bench,
    "loss": bench_loss.bench,
    "step": bench_step.bench,
    "fleet": bench_fleet.bench,
    "knn": bench_knn.bench,
    "linear": bench_linear.bench,
    "scaling": bench_scaling.bench,
    "latency": bench_latency.bench,
}


def bench(config: BenchConfig) -> BenchReport:
    """Measures and prints; returns what was measured."""
    measure = lookup(BENCHES, config.bench, "bench")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    report = measure(config)
    print(to_json(report) if config.json else render(report))
    return report
