"""A comparison as Markdown for terminals, LaTeX for papers, CSV for programs."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from seed_exp.base.table import csv_text, markdown_table
from seed_exp.reporting.comparison import Table
from seed_exp.reporting.other_results import other_results
from seed_exp.reporting.published import Published
from seed_exp.reporting.table_cells import MEASURES, TableCell, Value

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
        "−": "$-$",
        "…": r"\ldots{}",
    }
    | {character: f"\\{character}" for character in "&%$#_{}"}
)
BEST = "†"
"""Marks a difference of which our side is the best of several learning rates."""
BEST_MEANING = (
    "ours is the best of several learning rates, "
    "chosen on the images that it is measured on: optimistic"
)
REFERENCES = "Published by other methods, for reference"
OTHER = "published by another method"
REFERENCE_HEADER = ("student", "method", "images", "numbers, %", "source")
CSV_HEADER = (
    *("table", "student", "parameters", "setting", "measure", "ours", "std", "n", "seeds"),
    *(
        "published",
        "difference",
        "best_of",
        "published_source",
        "does_not_compare",
        "state",
        "commands",
        "files",
    ),
)


def markdown(table: Table) -> str:
    """The table as Markdown, with its legend, notes, references and commands for missing cells."""
    names = _short_names(table)
    sized = any(size is not None for size in table.parameters.values())
    header = [
        "student",
        *(["parameters"] if sized else []),
        *(f"{name} {measure}".strip() for name in names for measure in table.measures),
    ]
    rows = []
    for row in table.rows:
        cells = [
            _markdown_cell(table.cells.get((row, number)), table.measures)
            for number in range(len(table.columns))
        ]
        rows.append(
            [
                row,
                *([size_text(table.parameters[row])] if sized else []),
                *(text for cell in cells for text in cell),
            ]
        )
    lines = [f"## {table.title}", "", markdown_table(header, rows), ""]
    lines += [
        f"- {name}: {column.label}"
        for name, column in zip(names, table.columns, strict=True)
        if name
    ]
    lines += [f"- {measure}: {MEASURES[measure].meaning}, %" for measure in table.measures]
    lines += [f"- {line}" for line in (*legend(table), *table.notes)]
    if rows := reference_rows(table):
        lines += ["", f"{REFERENCES}:", "", markdown_table(REFERENCE_HEADER, rows)]
    if others := other_results(table):
        cells = [
            [one.row, one.column, one.evaluation, one.images, measures_text(one.values)]
            for one in others
        ]
        names = ["student", "setting", "evaluation", "images", "numbers"]
        columns = list(zip(*cells, strict=True))
        # A column that says the same in each row costs width and tells nothing apart.
        same = [number for number in (1, 2, 3) if len(set(columns[number])) == 1]
        common = "".join(f"; {names[number]}: {columns[number][0]}" for number in same)
        varying = [number for number in range(len(names)) if number not in same]
        lines += [
            "",
            f"Other evaluations, %{common}:",
            "",
            markdown_table(
                [names[number] for number in varying],
                [[row[number] for number in varying] for row in cells],
            ),
        ]
    if commands := missing_commands(table):
        lines += [
            "",
            "Missing:",
            "",
            "```bash",
            *(f"{command}  # {state}" for command, state in commands.items()),
            "```",
        ]
    return "\n".join(line.replace("<", "&lt;") for line in lines)


def legend(table: Table) -> list[str]:
    """Meanings of the signs that occur in the table, a line each."""
    values = [value for cell in table.cells.values() for value in cell.values.values()]
    lines = []
    if any(value.std is not None for value in values):
        lines.append("± is the standard deviation over n training seeds")
    if any(value.difference is not None for value in values):
        lines.append("in parentheses: published, and ours less published in points")
    if any(value.difference is not None and value.best_of > 1 for value in values):
        lines.append(f"{BEST}: {BEST_MEANING}")
    if any(value.published and value.reasons for value in values):
        reasons = dict.fromkeys(
            reason for value in values if value.published for reason in value.reasons
        )
        lines.append(
            "in square brackets: published for reference only, "
            f"it does not compare with ours ({'; '.join(reasons)})"
        )
    return lines


def reference_rows(table: Table) -> list[list[str]]:
    """Cells of REFERENCE_HEADER for each network and method of the table's references."""
    measures = {MEASURES[name].protocol: name for name in table.measures}
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for row in table.references:
        found.setdefault((row.student, row.method, row.dataset, row.source), []).append(
            f"{measures[row.protocol]} {published_text(row)}"
        )
    return [
        [student, method, dataset, "; ".join(numbers), source]
        for (student, method, dataset, source), numbers in found.items()
    ]


def missing_commands(table: Table) -> dict[str, str]:
    """Command -> the missing cells that it fills, in words."""
    found: dict[str, dict[str, list[str]]] = {}
    for (row, number), cell in table.cells.items():
        for command in cell.todo:
            found.setdefault(command, {}).setdefault(
                f"{table.columns[number].label}: {cell.state}", []
            ).append(row)
    return {
        command: "; ".join(f"{', '.join(rows)}; {what}" for what, rows in cells.items())
        for command, cells in found.items()
    }


def published_text(published: Published) -> str:
    """The published number, with one decimal, or with two if it has them."""
    return (
        f"{published.value:.1f}"
        if round(published.value, 1) == published.value
        else f"{published.value:g}"
    )


def size_text(size: int | None) -> str:
    """Number of parameters; empty if it is not known."""
    return "" if size is None else f"{size:,}"


def value_text(value: Value) -> str:
    """Our number: `57.1 ± 0.2, n=3`; empty if there is none."""
    if value.mean is None:
        return ""
    return (
        f"{value.mean:.1f}"
        if value.std is None
        else f"{value.mean:.1f} ± {value.std:.1f}, n={len(value.sources)}"
    )


def difference_text(value: Value) -> str:
    """Our number minus the published one: `-0.5`; empty if they do not compare.

    BEST marks a difference whose own side is the best of several learning rates.
    """
    return (
        ""
        if value.difference is None
        else f"{value.difference:+.1f}{BEST if value.best_of > 1 else ''}"
    )


def measures_text(values: Mapping[str, Value]) -> str:
    """All numbers with their names: `top1 57.1 ± 0.2, n=3; top5 81.0`."""
    return "; ".join(f"{name} {value_text(value)}" for name, value in values.items())


def latex(table: Table) -> str:
    """The table as a tabular of LaTeX, which needs booktabs and xcolor.

    Published numbers stand below each student: with the difference if they compare, otherwise in
    grey. References are the last lines.
    """
    width = len(table.measures)
    groups = [rf"\multicolumn{{{width}}}{{c}}{{{_tex(column.label)}}}" for column in table.columns]
    rules = [
        rf"\cmidrule(lr){{{3 + width * number}-{2 + width * (number + 1)}}}"
        for number in range(len(table.columns))
    ]
    lines = [
        f"% {table.title}; needs booktabs and xcolor".replace("\n", " "),
        rf"\begin{{tabular}}{{lr{('r' * width) * len(table.columns)}}}",
        r"\toprule",
        " & ".join(["", "", *groups]) + r" \\",
        "".join(rules),
        " & ".join(
            [
                "student",
                "parameters",
                *(_tex(name) for _ in table.columns for name in table.measures),
            ]
        )
        + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        cells = [table.cells.get((row, number)) for number in range(len(table.columns))]
        values = [cell.values[name] if cell else None for cell in cells for name in table.measures]
        size = table.parameters[row]
        lines.append(
            " & ".join([_tex(row), "" if size is None else f"{size:,}", *map(_tex_ours, values)])
            + r" \\"
        )
        if any(value and value.published for value in values):
            lines.append(
                " & ".join([r"\quad published", "", *map(_tex_published, values)]) + r" \\"
            )
    if references := reference_rows(table):
        lines.append(r"\midrule")
    for student, method, dataset, numbers, _ in references:
        text = _tex(f"{student}, {method}: {numbers} ({dataset})")
        columns = 2 + width * len(table.columns)
        lines.append(rf"\multicolumn{{{columns}}}{{l}}{{\textcolor{{gray}}{{{text}}}}} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def comma_separated(tables: Sequence[Table]) -> str:
    """The tables as CSV: a line for each number, found, missing or published for reference."""
    rows: list[Sequence[object]] = [CSV_HEADER]
    for table in tables:
        lines = [
            (
                row,
                table.columns[number].label,
                name,
                cell.values[name],
                cell.state,
                "; ".join(cell.todo),
            )
            for (row, number), cell in table.cells.items()
            for name in table.measures
        ]
        lines += [
            (one.row, one.column, f"{one.evaluation} {name} on {one.images}", value, "", "")
            for one in other_results(table)
            for name, value in one.values.items()
        ]
        measures = {MEASURES[name].protocol: name for name in table.measures}
        lines += [
            (one.student, one.method, measures[one.protocol], Value((), one, (OTHER,)), "", "")
            for one in table.references
        ]
        for row, setting, name, value, state, todo in lines:
            seeds = " ".join(str(one.seed) for one in value.sources)
            files = " ".join(str(one.result.path) for one in value.sources)
            theirs, source = (
                (value.published.value, value.published.source) if value.published else (None, None)
            )
            rows.append(
                (
                    *(table.title, row, table.parameters.get(row), setting, name),
                    *(_rounded(value.mean), _rounded(value.std), len(value.sources), seeds),
                    *(
                        theirs,
                        _rounded(value.difference),
                        value.best_of,
                        source,
                        "; ".join(value.reasons),
                    ),
                    *(state, todo, files),
                )
            )
    return csv_text(rows)


def _short_names(table: Table) -> list[str]:
    """A letter per column, because the labels would make the table wider than a terminal."""
    if len(table.columns) == 1:
        return [""]
    letters = string.ascii_uppercase
    return [
        letters[number] if number < len(letters) else f"{number + 1}"
        for number in range(len(table.columns))
    ]


def _markdown_cell(cell: TableCell | None, measures: Sequence[str]) -> list[str]:
    if cell is None:
        return ["" for _ in measures]
    texts = []
    for name in measures:
        value = cell.values[name]
        published = ""
        if value.published is not None:
            shown, difference = published_text(value.published), difference_text(value)
            published = (
                f" [{shown}]"
                if value.reasons
                else f" ({shown}, {difference})"
                if difference
                else f" ({shown})"
            )
        texts.append(f"{value_text(value) or '–'}{published}")
    if cell.state and texts:
        texts[0] = f"{cell.state}{'' if texts[0] == '–' else f'; {texts[0]}'}"
    return texts


def _tex(text: str) -> str:
    return text.translate(_LATEX)


def _tex_ours(value: Value | None) -> str:
    if value is None or value.mean is None:
        return "--"
    return (
        f"{value.mean:.1f}"
        if value.std is None
        else rf"{value.mean:.1f}\,{{\scriptsize$\pm${value.std:.1f}}}"
    )


def _tex_published(value: Value | None) -> str:
    if value is None or value.published is None:
        return ""
    shown = published_text(value.published)
    if value.reasons:
        return rf"\textcolor{{gray}}{{{shown}}}"
    if value.difference is None:
        return shown
    mark = r"^\dagger" if value.best_of > 1 else ""
    return f"{shown} (${value.difference:+.1f}{mark}$)"


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)
