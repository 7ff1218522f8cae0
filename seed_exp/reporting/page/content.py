"""What the page shows, and what its sections share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from seed_exp.reporting.comparison import Table
from seed_exp.reporting.published import Published
from seed_exp.reporting.runs import Run


class Model(NamedTuple):
    """What a network costs, whatever trains it."""

    parameters: int
    flops: int | None
    """Of a forward pass of one evaluation view."""


@dataclass(frozen=True)
class PageContent:
    """All that the page shows."""

    title: str
    tables: Sequence[Table]
    runs: Sequence[Run]
    published: Sequence[Published]
    models: Mapping[str, Model]
    """By network, as far as known."""
    problems: Sequence[str]
    """One line each."""


class Group(NamedTuple):
    """Runs that are drawn alike: the seeds of a student in a setting."""

    name: str
    members: Sequence[tuple[str, Run]]


def groups_of(tables: Sequence[Table]) -> list[Group]:
    """The cells with runs; a run that several tables show is drawn once."""
    groups = []
    seen: set[tuple[str, str]] = set()
    for table in tables:
        for (row, number), cell in table.cells.items():
            members = [
                (name, run) for name, run in cell.runs if (name, str(run.folder)) not in seen
            ]
            seen |= {(name, str(run.folder)) for name, run in members}
            if members:
                label = f"{row}, {table.columns[number].label}" if len(table.columns) > 1 else row
                groups.append(Group(label, members))
    return groups


def anchor_of(table: int, row: int, column: int) -> str:
    return f"t{table}r{row}c{column}"


def shown_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def plural(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
