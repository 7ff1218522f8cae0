"""Tables with students in rows and an experiment's settings in columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from seed_exp.base.average_names import with_averages
from seed_exp.base.redaction import redact
from seed_exp.reporting.columns import TableColumn, columns_of
from seed_exp.reporting.entries import (
    NO_TEACHER,
    Entry,
    PlannedJob,
    entry_of,
    images_of,
    key_of,
    match_runs,
    sized_as_found,
)
from seed_exp.reporting.published import Published, references, students_of
from seed_exp.reporting.runs import Run
from seed_exp.reporting.table_cells import (
    MEASURES,
    EvaluationCommand,
    TableCell,
    cell_of,
    main_protocols,
)


@dataclass(frozen=True)
class Table:
    """Our numbers beside published ones, and the commands for missing ones."""

    title: str
    """Title of the table."""
    rows: list[str]
    """Networks of the students."""
    parameters: dict[str, int | None]
    """Network of a row -> number of its encoder's parameters; None = unknown."""
    columns: list[TableColumn]
    """Settings of the experiment."""
    cells: dict[tuple[str, int], TableCell]
    """(row, number of the column) -> cell; absent where nothing was planned."""
    measures: list[str]
    """Keys of MEASURES: those with a number, or all asked ones if there is no number yet."""
    notes: list[str] = field(default_factory=list)
    """A line for each run that is left out, and for images that differ."""
    references: list[Published] = field(default_factory=list)
    """Published numbers of the rows' networks by methods that are not here; they never compare."""


def compare(
    title: str,
    runs: Sequence[Run],
    published: Sequence[Published],
    evaluation_command: EvaluationCommand,
    jobs: Sequence[PlannedJob] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Table:
    """The table of all `runs`, or of those that `jobs` plan.

    A run fills a planned cell if all its options that change results are the plan's. A student that
    was trained alone fills the cell for which a fleet was planned, because it becomes the same.
    Every measure has one protocol, the one that most runs have.

    Args:
        title: Title of the table.
        runs: All runs that were found.
        published: Numbers to stand beside ours.
        evaluation_command: Makes the command line for a missing evaluation.
        jobs: Planned jobs; None = the runs are all there is.
        sizes: Network -> number of its parameters, for networks that no run has written yet.
    """
    folders = {run.folder.resolve(): run for run in runs}
    found = [
        entry_of(run.command, run.options, name, None, run, folders)
        for run in runs
        for name in with_averages(run.students, run.options.get("ema_decay"))
    ]
    notes: list[str] = []
    if jobs is None:
        entries = [
            entry._replace(setting={**entry.setting, "images": images_of(entry)}) for entry in found
        ]
    else:
        planned = [
            entry_of(job.command, job.options, name, job, None, folders)
            for job in jobs
            for name in with_averages(students_of(job.options), job.options.get("ema_decay"))
        ]
        entries = match_runs(sized_as_found(planned, found), found, notes)
    labelled = columns_of([entry.setting for entry in entries])
    columns = list(dict.fromkeys(labelled[key_of(entry.setting)].label for entry in entries))
    # The baseline first, otherwise in the given order.
    columns.sort(key=lambda label: NO_TEACHER not in label)
    chosen = {column.label: column for column in labelled.values()}
    protocols = main_protocols(entries, notes)
    rows = list(dict.fromkeys(entry.row for entry in entries))
    cells = {}
    for row in rows:
        for number, label in enumerate(columns):
            mine = [
                entry
                for entry in entries
                if entry.row == row and labelled[key_of(entry.setting)].label == label
            ]
            if mine:
                cells[row, number] = cell_of(mine, published, protocols, evaluation_command, notes)
    measures = [
        name
        for name, measure in MEASURES.items()
        if any(
            cell.values[name].sources or (measure.asked and cell.values[name].published)
            for cell in cells.values()
        )
    ]
    parameters: dict[str, int | None] = {
        row: next(
            (
                size
                for entry in entries
                if entry.row == row and (size := _parameters(entry)) is not None
            ),
            (sizes or {}).get(row),
        )
        for row in rows
    }
    measures = measures or [name for name, measure in MEASURES.items() if measure.asked]
    shown = {MEASURES[name].protocol for name in measures}
    return Table(
        title,
        rows,
        parameters,
        [chosen[label] for label in columns],
        cells,
        measures,
        [redact(note) for note in notes],
        [row for row in references(published, rows) if row.protocol in shown],
    )


def _parameters(entry: Entry) -> int | None:
    network = None if entry.run is None else entry.run.networks.get(entry.name)
    return None if network is None else network.parameters
