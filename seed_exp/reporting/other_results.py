"""Results beside the columns of a table: transfer to other images, detection, other protocols."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from seed_exp.reporting.comparison import Table
from seed_exp.reporting.published import short_fingerprint
from seed_exp.reporting.table_cells import Provenance, TableCell, Value, latest, protocol_id

MOST_MEASURES = 6
"""Most numbers of one evaluation that are shown."""


class OtherResult(NamedTuple):
    """An evaluation of a student in a setting, by one protocol."""

    row: str
    """Network of the student."""
    column: str
    """Label of the setting."""
    evaluation: str
    """Name of the evaluation."""
    images: str
    """Images that were classified or searched."""
    protocol: str
    """Protocol, as `protocol_id` gives it."""
    values: Mapping[str, Value]
    """Measure -> value in percent, with a source per seed."""


def other_results(table: Table) -> list[OtherResult]:
    """Evaluations of the table's runs that no cell shows, in the order of the cells."""
    shown = {
        protocol_id(source.result)
        for cell in table.cells.values()
        for value in cell.values.values()
        for source in value.sources
    }
    return [
        OtherResult(row, table.columns[number].label, *found)
        for (row, number), cell in table.cells.items()
        for found in _of_cell(cell)
        if found[2] not in shown
    ]


def _of_cell(cell: TableCell) -> list[tuple[str, str, str, dict[str, Value]]]:
    """Evaluation, images, protocol and values of each evaluation of the cell's runs."""
    sources: dict[tuple[str, str, str], dict[str, list[Provenance]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for name, run in cell.runs:
        for protocol, result in {
            protocol_id(result): result for result in run.results if name in result.values
        }.items():
            images = short_fingerprint(result.protocol.get("val", result.protocol.get("queries")))
            measures = sources[result.evaluation, images, protocol]
            for key in list(result.values[name])[:MOST_MEASURES]:
                if (source := latest(run, name, result.evaluation, protocol, key)) is not None:
                    measures[key].append(source)
    return [
        (*place, {key: Value(tuple(of), None, ()) for key, of in values.items()})
        for place, values in sorted(sources.items())
    ]
