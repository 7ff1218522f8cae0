"""Sweeps as tables, JSON and CSV."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from seed_exp.base.average_names import network_behind, with_averages
from seed_exp.base.files import atomic_write
from seed_exp.base.table import csv_text, markdown_table
from seed_exp.cluster.sweep_cells import Cell, State, Status, last_lines
from seed_exp.cluster.sweeps import Sweep, summary
from seed_exp.config.schema import EVALUATIONS


def status_table(sweep: Sweep, statuses: Sequence[Status]) -> str:
    """A line for each cell; below, the last log line of each unfinished one."""
    header = ["cell", "state", "step", "loss", "img/s", "left", "node", "requeues"]
    rows, last_words = [], []
    for number, ((label, _), status) in enumerate(zip(sweep.cells, statuses, strict=True)):
        known = status.progress
        step = f"{known['step']}/{known['num_steps']}" if "step" in known else ""
        loss = f"{known['loss']:.4g}" if "loss" in known else ""
        running = status.state is State.RUNNING
        rate = f"{known['images_per_s']:.0f}" if running and "images_per_s" in known else ""
        left = (
            str(datetime.timedelta(seconds=round(known["seconds_left"])))
            if running and "seconds_left" in known
            else ""
        )
        requeues = str(status.restarts) if status.restarts else ""
        rows.append(
            [
                f"{number} {label}",
                status.word or status.state.value,
                step,
                loss,
                rate,
                left,
                status.node,
                requeues,
            ]
        )
        if status.said and status.state is not State.FINISHED:
            last_words.append(f"{number}: {status.said}")
    below = ["", *last_words] if last_words else []
    return "\n".join(
        [f"{sweep.name}: {summary(statuses)}", "", markdown_table(header, rows), *below]
    )


def status_json(sweep: Sweep, statuses: Sequence[Status]) -> dict[str, Any]:
    """The status of each cell, for programs."""
    cells = []
    for number, ((label, cell), status) in enumerate(zip(sweep.cells, statuses, strict=True)):
        last = cell.attempts[-1] if cell.attempts else None
        job = (
            {"job": None, "log": None}
            if last is None
            else {"job": last.job, "log": f"{last.folder}/{last.job}.log"}
        )
        run = None if status.run is None else os.fspath(status.run)
        cells.append(
            {
                "cell": number,
                "label": label,
                **job,
                **status._asdict(),
                "state": status.state.value,
                "run": run,
            }
        )
    return {"sweep": sweep.name, "command": sweep.command, "words": sweep.words, "cells": cells}


def outcome(number: int, label: str, cell: Cell, status: Status) -> dict[str, Any]:
    """Everything known of a cell: options, last value of each metric, all files in its results/."""
    entry = {
        "cell": number,
        "label": label,
        "command": cell.command,
        "overrides": cell.overrides,
        "state": status.state.value,
    }
    config = None if status.run is None else status.run / "config.json"
    if status.run is None or config is None or not config.exists():
        return {**entry, "run": None, "options": {}, "metrics": {}, "results": []}
    metrics: dict[str, Any] = {}
    for line in last_lines(status.run / "metrics.jsonl"):
        metrics |= line
    results = [
        json.loads(file.read_text()) for file in sorted((status.run / "results").glob("*.json"))
    ]
    options = json.loads(config.read_text())["options"]
    return {
        **entry,
        "run": os.fspath(status.run),
        "options": options,
        "metrics": metrics,
        "results": results,
    }


def outcome_table(outcomes: Sequence[dict[str, Any]]) -> str:
    """A line for each student of each cell: its last numbers of training, its evaluations, its run.

    Only evaluations with results have a column; one made by several protocols shows each number.
    """
    made = {result["evaluation"] for one in outcomes for result in one["results"]}
    evaluations = {name: kind.headline for name, kind in EVALUATIONS.items() if name in made}
    rows = []
    for one in outcomes:
        names = list(one["options"].get("students") or [""])
        for student in with_averages(names, one["options"].get("ema_decay")):
            network = network_behind(student, names)
            keys = ("loss", "knn10") if network == student else ("", "knn10_ema")
            found = [[one["metrics"].get(f"{network}/{key}")] for key in keys]
            found += [
                [
                    result["results"].get(student, {}).get(key)
                    for result in one["results"]
                    if result["evaluation"] == name
                ]
                for name, key in evaluations.items()
            ]
            numbers = [", ".join(f"{value:.4g}" for value in _known(values)) for values in found]
            cell = f"{one['cell']} {one['label']}"
            rows.append([cell, one["state"], student, *numbers, one["run"] or ""])
    columns = [f"{name} {key}" for name, key in evaluations.items()]
    return markdown_table(
        ["cell", "state", "student", "loss", "knn10", *columns, "run folder"], rows
    )


def _known(values: Sequence[Any]) -> list[float]:
    return [value for value in values if isinstance(value, int | float)]


def write_csv(path: Path, outcomes: Sequence[dict[str, Any]]) -> None:
    """A line for each number of each cell; a cell that has none is a line without one."""
    lines: list[list[Any]] = [["cell", "label", "state", "run", "source", "name", "value"]]
    for one in outcomes:
        beginning = [one["cell"], one["label"], one["state"], one["run"] or ""]
        numbers = [["metrics", *pair] for pair in _numbers(one["metrics"])]
        numbers += [
            [result["evaluation"], *pair]
            for result in one["results"]
            for pair in _numbers(result["results"])
        ]
        lines += [[*beginning, *number] for number in numbers or [["", "", ""]]]
    with atomic_write(path) as file:
        file.write(csv_text(lines).encode())


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Names and values of the numbers in nested results."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, int | float):
        yield name, value
