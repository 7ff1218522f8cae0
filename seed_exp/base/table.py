"""Tables that read well in a terminal and are Markdown at the same time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_FORMULA = (*"=+-@\t\r\n", *"\uff1d\uff0b\uff0d\uff20")
"""Beginnings of formulas; the last four are full-width signs, which some spreadsheets read too."""


@dataclass(frozen=True)
class ComparisonRow:
    """One network of a comparison."""

    name: str
    """Name of the network, e.g. `student convnet_w2`."""
    method: str
    """How it was trained, e.g. `SEED`."""
    parameters: int
    """Parameters of the encoder."""
    knn: float
    """k-NN top-1 accuracy in percent."""
    linear: float
    """Top-1 accuracy of linear evaluation in percent."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column aligned left and the others, which hold numbers, right.

    Raises:
        ValueError: the number of cells in a row differs from that of the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"the table has {len(header)} columns, but a row has {len(row)} cells: {list(row)}"
            )
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as comma-separated values; text that a spreadsheet would take for a formula gets a '."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([[_no_formula(cell) for cell in row] for row in rows])
    return text.getvalue()


def _no_formula(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def comparison_table(
    rows: Sequence[ComparisonRow], baseline: ComparisonRow | None = None, *, k: int = 10
) -> str:
    """Networks side by side as in SEED's Table 1 (arXiv:2101.04731): size, k-NN and linear top-1.

    Args:
        rows: Networks in the order of the table.
        baseline: The same network trained without a teacher. Rows of its name get one more cell:
            their difference to its linear top-1 in percentage points.
        k: Neighbours of the k-NN evaluation, for the header.

    Returns:
        Markdown without a newline at the end.
    """
    header = ["network", "pre-training", "parameters", f"k-NN (k={k})", "linear top-1"]
    cells = [
        [row.name, row.method, f"{row.parameters:,}", f"{row.knn:.1f}", f"{row.linear:.1f}"]
        for row in rows
    ]
    if baseline is not None:
        header.append(f"vs {baseline.method}")
        for row, line in zip(rows, cells, strict=True):
            compared = row != baseline and row.name == baseline.name
            line.append(f"{row.linear - baseline.linear:+.1f}" if compared else "")
    return markdown_table(header, cells)
