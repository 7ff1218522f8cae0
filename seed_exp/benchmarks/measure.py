"""Measures several ways to do the same thing side by side, and writes the table of results."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from seed_exp.base.table import markdown_table

MIN_ROUNDS = 3
"""Rounds that are timed at least."""


@dataclass(frozen=True)
class Contender:
    """One way to do the thing that is measured."""

    name: str
    """Name of the way: `ours`, `plain`, or a library."""
    run: Callable[[], Any]
    """Makes one repetition."""
    items: int
    """Items that one repetition processes, e.g. images if the report's unit is `img/s`."""


@dataclass(frozen=True)
class BenchRow:
    """Measurements of one contender."""

    name: str
    """Name of the contender."""
    runs: int
    """Number of timed repetitions."""
    median_s: float
    """Median time of a repetition in seconds."""
    low_s: float
    """First quartile of the times in seconds."""
    high_s: float
    """Third quartile of the times in seconds."""
    p95_s: float
    """Time in seconds that 95 % of the repetitions do not exceed."""
    rate: float
    """Items per second at the median time."""
    peak_memory: int | None
    """Bytes that a repetition allocates at its peak; None if the system cannot tell."""
    times: tuple[float, ...]
    """Seconds of each repetition, one per round."""


@dataclass(frozen=True)
class BenchReport:
    """Results of a bench, ready to print."""

    title: str
    """Name of the work that was measured."""
    unit: str
    """Unit of the rates, e.g. `img/s`."""
    rows: list[BenchRow]
    """Measurements of the ways to do the work."""
    reference: str
    """Name of the row with which the others are compared."""
    bounds: list[BenchRow]
    """Measurements of parts of the work that every way needs: no rate can exceed theirs."""
    facts: dict[str, str]
    """Facts that the numbers depend on: sizes, threads, versions, device, date."""

    def ratio(self, row: BenchRow) -> float:
        """Returns the speed of `row`, as a multiple of the reference's.

        If both ran in the same rounds, it is the median of the rounds' ratios, which does not
        change when the machine's speed changes between rounds. Otherwise it is the ratio of the
        medians.
        """
        reference = next(other for other in self.rows if other.name == self.reference)
        items = (row.rate * row.median_s) / (reference.rate * reference.median_s)
        if len(row.times) != len(reference.times):
            return row.rate / reference.rate
        return items * statistics.median(
            theirs / own for theirs, own in zip(reference.times, row.times, strict=True)
        )


def interleave(
    contenders: Sequence[Contender], *, seconds: float, device: torch.device
) -> list[BenchRow]:
    """Measures all contenders in turn, A B A B ..., so that a slow machine slows all of them down.

    Each runs once to warm up, then once per round until `seconds` are over, for at least MIN_ROUNDS
    rounds. One more run, which is not timed, measures its memory.
    """
    for contender in contenders:
        _timed(contender.run, device)
    times: list[list[float]] = [[] for _ in contenders]
    begin = time.perf_counter()
    while len(times[0]) < MIN_ROUNDS or time.perf_counter() - begin < seconds:
        for contender, own in zip(contenders, times, strict=True):
            own.append(_timed(contender.run, device))
    return [
        _row(contender, own, peak_memory(contender.run, device))
        for contender, own in zip(contenders, times, strict=True)
    ]


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Returns the bytes that `run` allocates at its peak, beyond those allocated before it.

    On a GPU these are PyTorch's allocations. On a CPU they are the growth of the process's resident
    memory, to about a megabyte, which only Linux tells; on other systems the result is None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _return_freed_memory()
    try:
        # Resets the high-water mark VmHWM to the present size.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def machine(device: torch.device) -> dict[str, str]:
    """Facts that every report states: device, threads, version of torch, date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": f"{device.type}, {name}",
        "CPU threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def render(report: BenchReport) -> str:
    """Returns the report as Markdown: a table with the rows, then the bounds; then the facts."""
    header = [
        report.title,
        report.unit,
        f"x {report.reference}",
        "median",
        "quartiles",
        "95 %",
        "peak memory",
        "runs",
    ]
    cells = [_cells(row, report) for row in report.rows]
    cells += [
        [f"bound: {name}", *others]
        for name, *others in (_cells(row, report) for row in report.bounds)
    ]
    return "\n".join(
        [
            markdown_table(header, cells),
            "",
            *(f"- {name}: {value}" for name, value in report.facts.items()),
        ]
    )


def to_json(report: BenchReport) -> str:
    """Returns the report as one JSON object: its fields, and `ratio` in each row."""
    content = asdict(report)
    for key, rows in (("rows", report.rows), ("bounds", report.bounds)):
        content[key] = [{**asdict(row), "ratio": report.ratio(row)} for row in rows]
        for row in content[key]:
            del row["times"]  # they can be thousands of numbers
    return json.dumps(content, indent=2)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    _wait_for(device)
    begin = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - begin


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(contender: Contender, times: list[float], memory: int | None) -> BenchRow:
    steps = statistics.quantiles(times, n=20, method="inclusive")
    low, median, high, p95 = steps[4], steps[9], steps[14], steps[18]
    return BenchRow(
        contender.name,
        len(times),
        median,
        low,
        high,
        p95,
        contender.items / median,
        memory,
        tuple(times),
    )


def _cells(row: BenchRow, report: BenchReport) -> list[str]:
    return [
        row.name,
        f"{row.rate:,.0f}" if row.rate >= 100 else f"{row.rate:.3g}",
        f"{report.ratio(row):.2f}",
        _duration(row.median_s),
        f"{_duration(row.low_s)} to {_duration(row.high_s)}",
        _duration(row.p95_s),
        "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.1f} MiB",
        str(row.runs),
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _return_freed_memory() -> None:
    """Returns freed memory that malloc keeps to the system.

    Otherwise a run that uses this memory again would seem to need none.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    """Bytes that the line `field` of /proc/self/status states."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{field}:")
    )
    return 1024 * int(line.split()[1])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.machine(),
    )
