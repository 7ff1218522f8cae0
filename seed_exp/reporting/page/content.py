"""Content of the page, and functions that its sections share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from seed_exp.reporting.comparison import Table
from seed_exp.reporting.published import Published
from seed_exp.reporting.runs import Run


class Model(NamedTuple):
    """Costs of a network, however it is trained."""

    parameters: int
    """Number of parameters of the encoder."""
    flops: int | None
    """Floating-point operations of a forward pass on one evaluation view; None if unknown."""


@dataclass(frozen=True)
class PageContent:
    """Everything that the page shows."""

    title: str
    """Title of the page."""
    tables: Sequence[Table]
    """Tables of our numbers beside published ones."""
    runs: Sequence[Run]
    """All runs that were read."""
    published: Sequence[Published]
    """All published numbers."""
    models: Mapping[str, Model]
    """Costs of the networks, by the network's name; only those that are known."""
    problems: Sequence[str]
    """One line for each file or folder that could not be read."""


class Group(NamedTuple):
    """Runs that are drawn alike: a student in one setting, with several seeds."""

    name: str
    """Name of the group in legends."""
    members: Sequence[tuple[str, Run]]
    """Name of the student and run, for each seed."""


def groups_of(tables: Sequence[Table]) -> list[Group]:
    """Returns a group for each cell with runs; a run that several tables show is drawn once."""
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
    """Returns the anchor of the article about a cell, from the numbers of table, row and column."""
    return f"t{table}r{row}c{column}"


def shown_value(value: Any) -> str:
    """Returns an option's value as text: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def plural(number: int, what: str) -> str:
    """Returns `1 run` or `2 runs`, for the noun `what`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
