"""Sections of the page with tables: our numbers beside published ones, and other evaluations."""

from __future__ import annotations

from collections.abc import Sequence

from seed_exp.reporting.comparison import Table
from seed_exp.reporting.other_results import OtherResult
from seed_exp.reporting.page.content import anchor_of, plural, shown_value
from seed_exp.reporting.page.html import Html, join, tag
from seed_exp.reporting.page.plots import axis_number
from seed_exp.reporting.table_cells import MEASURES, TableCell, Value
from seed_exp.reporting.table_formats import (
    BEST,
    BEST_MEANING,
    REFERENCE_HEADER,
    REFERENCES,
    difference_text,
    measures_text,
    missing_commands,
    published_text,
    reference_rows,
    value_text,
)


def table_section(index: int, table: Table) -> Html:
    """Returns table number `index`, its legend and references, its options, missing commands."""
    width = len(table.measures)
    top = [tag("th", column.label, colspan=width, scope="colgroup") for column in table.columns]
    second = [
        tag(
            "th",
            name,
            title=MEASURES[name].meaning,
            scope="col",
            class_="first" if name == table.measures[0] else None,
        )
        for _ in table.columns
        for name in table.measures
    ]
    rows = []
    for position, row in enumerate(table.rows):
        size = table.parameters[row]
        cells = [
            tag("th", row, scope="row"),
            tag(
                "td",
                "" if size is None else axis_number(size),
                title="" if size is None else f"{size:,}",
            ),
        ]
        for number in range(len(table.columns)):
            cells += _cells(
                table.cells.get((row, number)), table.measures, anchor_of(index, position, number)
            )
        rows.append(tag("tr", *cells))
    head = tag(
        "thead",
        tag("tr", tag("th", ""), tag("th", ""), *top),
        tag("tr", tag("th", "student", scope="col"), tag("th", "parameters", scope="col"), *second),
    )
    box = tag(
        "div",
        tag("table", head, tag("tbody", *rows)),
        class_="box",
        tabindex="0",
        role="region",
        aria_label=table.title,
    )
    return join(box, _legend(table), _references(table), _settings(table), _missing(table))


def _cells(cell: TableCell | None, measures: Sequence[str], anchor: str) -> list[Html]:
    if cell is None:
        return [tag("td", class_="first" if name == measures[0] else None) for name in measures]
    values = [cell.values[name] for name in measures]
    if not any(value.sources or value.published for value in values):
        return [
            tag(
                "td",
                tag("span", cell.state, class_="state"),
                colspan=len(measures),
                class_="first missing",
            )
        ]
    made = []
    for position, value in enumerate(values):
        empty = cell.state if position == 0 else "–"
        parts = (
            [_ours(value, anchor)] if value.sources else [tag("span", empty or "–", class_="state")]
        )
        if value.published is not None:
            parts.append(_theirs(value))
        if position == 0 and cell.state and value.sources:
            parts.append(tag("small", cell.state, class_="state"))
        classes = [*(["first"] if position == 0 else []), *([] if value.sources else ["missing"])]
        made.append(tag("td", *parts, class_=" ".join(classes) or None))
    return made


def _ours(value: Value, anchor: str) -> Html:
    text = value_text(value)
    number, _, spread = text.partition(" ")
    hover = "\n".join(
        f"seed {source.seed}: {source.value:.2f}, {source.result.path}" for source in value.sources
    )
    link = tag("a", number, href=f"#{anchor}", title=hover)
    return join(link, tag("span", f" {spread}", class_="spread")) if spread else link


def _theirs(value: Value) -> Html:
    assert value.published is not None
    shown = published_text(value.published)
    if value.reasons:
        return tag(
            "small",
            f"[{shown}]",
            class_="reference",
            title=f"{value.published.source}; does not compare: {'; '.join(value.reasons)}",
        )
    if value.difference is None:
        return tag("small", f"({shown})", title=value.published.source)
    difference = tag(
        "span",
        difference_text(value).replace("-", "−"),
        class_="better" if value.difference >= 0 else "worse",
    )
    return tag("small", f"({shown}, ", difference, ")", title=value.published.source)


def _legend(table: Table) -> Html:
    values = [value for cell in table.cells.values() for value in cell.values.values()]
    lines: list[str | Html] = [
        "; ".join(f"{name}: {MEASURES[name].meaning}" for name in table.measures)
        + "; all in percent."
    ]
    if any(value.std is not None for value in values):
        lines.append("± is the standard deviation over n training seeds.")
    if any(value.published and not value.reasons for value in values):
        lines.append("In parentheses: the published number, and ours minus it in points.")
    if any(value.difference is not None and value.best_of > 1 for value in values):
        lines.append(f"{BEST}: {BEST_MEANING}.")
    if reasons := dict.fromkeys(
        reason for value in values if value.published for reason in value.reasons
    ):
        lines.append(
            tag(
                "span",
                "[Grey]: published, for reference only. It does not compare with ours: "
                f"{'; '.join(reasons)}.",
                class_="reference",
            )
        )
    return tag("ul", *(tag("li", line) for line in [*lines, *table.notes]), class_="muted")


def _references(table: Table) -> Html:
    """Returns a table of the published numbers by other methods; empty if there are none."""
    rows = reference_rows(table)
    if not rows:
        return Html()
    head = tag("tr", *(tag("th", name, scope="col") for name in REFERENCE_HEADER))
    body = [
        tag("tr", tag("th", network, scope="row"), *(tag("td", text) for text in texts))
        for network, *texts in rows
    ]
    filled = tag("table", tag("thead", head), tag("tbody", *body))
    box = tag("div", filled, class_="box texts", tabindex="0", role="region", aria_label=REFERENCES)
    return join(tag("p", f"{REFERENCES}:", class_="muted"), box)


def others_section(others: Sequence[OtherResult]) -> Html:
    """Returns a table of the results that stand in no cell of another table."""
    if not others:
        return Html()
    header = ("student", "setting", "evaluation", "images", "protocol", "numbers, %")
    rows = [
        tag(
            "tr",
            tag("th", other.row, scope="row"),
            *(tag("td", text) for text in (other.column, other.evaluation, other.images)),
            tag("td", tag("a", other.protocol, href=f"#p{other.protocol}")),
            tag("td", measures_text(other.values), title=" ".join(_files(other))),
        )
        for other in others
    ]
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header))),
        tag("tbody", *rows),
    )
    return tag(
        "div",
        table,
        class_="box texts",
        tabindex="0",
        role="region",
        aria_label="Other evaluations",
    )


def _files(other: OtherResult) -> list[str]:
    return list(
        dict.fromkeys(
            str(source.result.path) for value in other.values.values() for source in value.sources
        )
    )


def _settings(table: Table) -> Html:
    """Returns a table of the options in which the columns differ."""
    names = sorted({name for column in table.columns for name in column.options})
    if not names:
        return Html()
    head = tag(
        "tr",
        tag("th", "option", scope="col"),
        *(tag("th", column.label, scope="col") for column in table.columns),
    )
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(
                tag("td", tag("code", shown_value(column.options[name])))
                for column in table.columns
            ),
        )
        for name in names
    ]
    box = tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="box")
    return tag(
        "details",
        tag("summary", f"The columns differ in {plural(len(names), 'option')}"),
        box,
    )


def _missing(table: Table) -> Html:
    commands = missing_commands(table)
    if not commands:
        return Html()
    lines = [join(tag("small", state), tag("pre", command)) for command, state in commands.items()]
    return tag(
        "details",
        tag("summary", f"Missing: {plural(len(commands), 'command')} would fill it"),
        *lines,
        open=len(commands) <= 3,
    )
