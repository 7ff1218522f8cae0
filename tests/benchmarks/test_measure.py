from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable

import numpy as np
import pytest
import torch

from seed_exp.benchmarks import measure
from seed_exp.benchmarks.measure import (
    BenchReport,
    BenchRow,
    Contender,
    interleave,
    peak_memory,
    render,
    to_json,
)

CPU = torch.device("cpu")
MIB = 2**20


def row(name: str, *times: float, items: int = 12, peak_memory: int | None = None) -> BenchRow:
    median = sorted(times)[len(times) // 2]
    low, high = min(times), max(times)
    return BenchRow(name, len(times), median, low, high, high, items / median, peak_memory, times)


def report(*rows: BenchRow, bounds: tuple[BenchRow, ...] = ()) -> BenchReport:
    return BenchReport("counting", "sheep/s", list(rows), "plain", list(bounds), {"fence": "1 m"})


def test_contenders_take_turns_after_one_warm_up_each() -> None:
    calls: list[str] = []
    ways = [Contender(name, lambda name=name: calls.append(name), 1) for name in "abc"]
    rows = interleave(ways, seconds=0, device=CPU)
    rounds = measure.MIN_ROUNDS
    assert calls == ["a", "b", "c"] * (1 + rounds + 1)  # warm-up, timed rounds, memory
    assert [row.name for row in rows] == ["a", "b", "c"]
    assert [row.runs for row in rows] == [rounds] * 3


def test_rounds_go_on_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def takes(seconds: float) -> Callable[[], None]:
        def run() -> None:
            clock[0] += seconds

        return run

    slow, fast = interleave(
        [Contender("slow", takes(3), 6), Contender("fast", takes(1), 6)], seconds=18, device=CPU
    )
    assert (slow.runs, fast.runs) == (5, 5)  # after four rounds of 4 s there are 2 s left
    assert (slow.median_s, slow.low_s, slow.high_s, slow.rate) == (3, 3, 3, 2)
    assert fast.times == (1, 1, 1, 1, 1)


def test_median_and_quartiles_are_those_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, durations = (
        [0.0],
        iter([7.0, 1.0, 5.0, 2.0, 4.0, 3.0, 7.0]),
    )  # first and last: warm-up and memory
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def run() -> None:
        clock[0] += next(durations)

    (found,) = interleave([Contender("a", run, 30)], seconds=15, device=CPU)
    assert found.times == (1, 5, 2, 4, 3)
    assert (found.low_s, found.median_s, found.high_s, found.rate) == (2, 3, 4, 10)
    assert found.p95_s == pytest.approx(np.quantile(found.times, 0.95))


def test_the_ratio_is_the_median_over_rounds_not_the_ratio_of_medians() -> None:
    plain, ours = (
        row("plain", 2, 40, 3),
        row("ours", 1, 10, 3),
    )  # the machine was slow in the second round
    both = report(plain, ours)
    assert both.ratio(ours) == 2
    assert both.ratio(plain) == 1


def test_the_ratio_is_one_of_rates() -> None:
    both = report(row("plain", 1, 1, 1, items=10), few := row("few", 0.5, 0.5, 0.5, items=5))
    assert both.ratio(few) == 1


def test_rows_of_other_rounds_are_compared_by_their_medians() -> None:
    both = report(row("plain", 4, 4, 4), bound := row("bound", 1, 2, 3, 3, 100))
    assert both.ratio(bound) == pytest.approx(4 / 3)


def peaks() -> tuple[int | None, int | None]:
    """Peaks of nothing, and of tensors of 48 and then 32 MiB, beside 128 MiB from before."""
    there_before = torch.ones(128 * MIB, dtype=torch.uint8)

    def run() -> int:
        torch.ones(48 * MIB, dtype=torch.uint8)
        return int(torch.ones(32 * MIB, dtype=torch.uint8)[0])  # the larger one is gone by now

    nothing, found = peak_memory(lambda: None, CPU), peak_memory(run, CPU)
    assert len(there_before) == 128 * MIB
    return nothing, found


def test_the_peak_memory_is_that_of_the_worst_moment_and_not_what_was_there_before() -> None:
    # In a process of its own: what other tests have freed changes what the allocator keeps.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        nothing, found = pool.apply(peaks)
    if nothing is None or found is None:
        pytest.skip("this system does not tell")
    assert nothing < 2 * MIB
    assert abs(found - 48 * MIB) < 2 * MIB


def test_freed_memory_that_the_allocator_keeps_counts_when_it_is_used_again() -> None:
    above = []

    def run() -> None:
        blocks = [
            torch.ones(MIB // 16, dtype=torch.uint8) for _ in range(640)
        ]  # 40 MiB that malloc keeps when freed,
        above.append(blocks.pop())  # because something above them is in use

    first, again = peak_memory(run, CPU), peak_memory(run, CPU)
    if first is None or again is None:
        pytest.skip("this system does not tell")
    assert abs(again - first) < 4 * MIB
    assert abs(again - 40 * MIB) < 4 * MIB


def test_where_the_system_does_not_tell_the_memory_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(measure.Path, "write_text", absent)
    assert peak_memory(lambda: None, CPU) is None
    assert "None" not in render(report(row("plain", 1)))


def test_the_table_has_a_line_for_every_row_then_for_every_bound() -> None:
    plain, ours, bound = (
        row("plain", 4, 4, 4, peak_memory=3 * MIB),
        row("ours", 2, 2, 2),
        row("shears", 0.1, 0.1, 0.1),
    )
    shown = render(report(plain, ours, bounds=(bound,)))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    assert lines[0] == [
        "counting",
        "sheep/s",
        "x plain",
        "median",
        "quartiles",
        "95 %",
        "peak memory",
        "runs",
    ]
    assert lines[2] == ["plain", "3", "1.00", "4 s", "4 s to 4 s", "4 s", "3.0 MiB", "3"]
    assert lines[3] == ["ours", "6", "2.00", "2 s", "2 s to 2 s", "2 s", "", "3"]
    both = ["100 ms to 100 ms", "100 ms"]
    assert lines[4] == ["bound: shears", "120", "40.00", "100 ms", *both, "", "3"]
    assert shown.splitlines()[-1] == "- fence: 1 m"


def test_json_has_what_the_table_has() -> None:
    content = json.loads(
        to_json(report(row("plain", 4), row("ours", 2, peak_memory=5), bounds=(row("shears", 1),)))
    )
    assert content.keys() == {"title", "unit", "rows", "reference", "bounds", "facts"}
    assert content["rows"][1] == {
        "name": "ours",
        "runs": 1,
        "median_s": 2,
        "low_s": 2,
        "high_s": 2,
        "p95_s": 2,
        "rate": 6,
        "peak_memory": 5,
        "ratio": 2,
    }
    assert [bound["ratio"] for bound in content["bounds"]] == [4]


@pytest.mark.gpu
def test_the_peak_memory_of_a_gpu_is_what_was_allocated_there() -> None:
    device = torch.device("cuda")
    there_before = torch.ones(128 * MIB, dtype=torch.uint8, device=device)
    assert peak_memory(
        lambda: torch.ones(48 * MIB, dtype=torch.uint8, device=device).sum(), device
    ) in range(48 * MIB, 50 * MIB)
    assert len(there_before) == 128 * MIB
