"""Sections of the page on the cost of the runs and on the origin of each number."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from seed_exp.reporting.comparison import Table
from seed_exp.reporting.other_results import OtherResult
from seed_exp.reporting.page.content import Group, Model, anchor_of, shown_value
from seed_exp.reporting.page.html import Html, join, tag
from seed_exp.reporting.published import network_of
from seed_exp.reporting.runs import Run
from seed_exp.reporting.table_cells import Provenance, TableCell, protocol_id, shared_protocol
from seed_exp.reporting.table_formats import published_text, value_text


def cost_section(groups: Sequence[Group], models: Mapping[str, Model]) -> Html:
    """Returns a table of the cost of each run: rates, time, memory, parameters, operations."""
    header = [
        "student",
        "seed",
        "steps",
        "img/s",
        "waiting for data",
        "training",
        "peak memory",
        "parameters",
        "forward pass",
        "run",
    ]
    rows = []
    for group in groups:
        for student, run in group.members:
            model, network = models.get(network_of(run.options, student)), run.networks.get(student)
            rates = [row["images_per_s"] for row in run.speed if "images_per_s" in row]
            waits = [row["data_wait_percent"] for row in run.speed if "data_wait_percent" in row]
            seconds = training_seconds(run)
            peak = max(
                (row["peak_memory_gib"] for row in run.speed if "peak_memory_gib" in row),
                default=None,
            )
            size = network.parameters if network else model.parameters if model else None
            cells: list[tuple[str, Any]] = [
                (str(run.options.get("seed")), run.options.get("seed")),
                (f"{run.step:,}", run.step),
                (
                    f"{statistics.median(rates):,.0f}" if rates else "–",
                    statistics.median(rates) if rates else -1,
                ),
                (
                    f"{statistics.median(waits):.0f} %" if waits else "–",
                    statistics.median(waits) if waits else -1,
                ),
                ("–" if seconds is None else _duration(seconds), seconds or -1),
                ("–" if peak is None else f"{peak:.1f} GiB", peak or -1),
                ("–" if size is None else f"{size:,}", size or -1),
                (
                    f"{model.flops / 1e9:.3g} GFLOP" if model and model.flops else "–",
                    model.flops if model and model.flops else -1,
                ),
            ]
            rows.append(
                tag(
                    "tr",
                    tag("th", group.name, scope="row"),
                    *(tag("td", text, data_value=value) for text, value in cells),
                    tag("td", tag("code", str(run.folder))),
                )
            )
    if not rows:
        return Html()
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header))),
        tag("tbody", *rows),
        class_="sortable",
    )
    note = (
        "Images per second and waiting are medians over a run; training is the time of its steps "
        "alone. The students of a fleet share a run and its cost."
    )
    return join(
        tag("div", table, class_="box", tabindex="0", role="region", aria_label="Cost"),
        tag("p", note, class_="muted"),
    )


def training_seconds(run: Run) -> float | None:
    """Returns the seconds of all logged steps, computed from their rates.

    None if the batch size or the rates are unknown.
    """
    batch_size = run.options.get("batch_size")
    if not isinstance(batch_size, int):
        return None
    steps = [0.0, *(row["step"] for row in run.speed)]
    spans = zip(steps, run.speed, strict=False)
    seconds = [
        (row["step"] - before) * batch_size / row["images_per_s"]
        for before, row in spans
        if row.get("images_per_s", 0) > 0
    ]
    return sum(seconds) if seconds else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def numbers_section(tables: Sequence[Table], others: Sequence[OtherResult]) -> Html:
    """Returns an article for each cell, and the protocols to which the articles link."""
    articles = []
    protocols = {
        other.protocol: value.sources[0] for other in others for value in other.values.values()
    }
    for index, table in enumerate(tables):
        for (row, number), cell in table.cells.items():
            sources = {name: cell.values[name].sources for name in table.measures}
            if any(sources.values()):
                protocols |= {
                    protocol_id(source.result): source
                    for same in sources.values()
                    for source in same
                }
                place = anchor_of(index, table.rows.index(row), number)
                articles.append(
                    _article(place, f"{row}, {table.columns[number].label}", cell, table.measures)
                )
    if not protocols:
        return Html()
    made = [
        tag(
            "article",
            tag("h3", f"{source.result.evaluation}, protocol {name}"),
            _facts(_flat(shared_protocol(source.result))),
            id=f"p{name}",
        )
        for name, source in sorted(protocols.items())
    ]
    return join(*articles, tag("h3", "Protocols"), *made)


def _article(place: str, title: str, cell: TableCell, measures: Sequence[str]) -> Html:
    parts = [tag("h3", title)]
    facts: list[tuple[str, str | Html]] = []
    for name in measures:
        value = cell.values[name]
        seeds = ", ".join(f"{source.value:.2f}" for source in value.sources)
        ours = f"{value_text(value) or '–'} ({seeds})"
        facts.append((name, ours))
        if value.published is not None:
            against = f"; does not compare: {'; '.join(value.reasons)}" if value.reasons else ""
            facts.append(
                (
                    f"{name} published",
                    f"{published_text(value.published)}, {value.published.source}{against}",
                )
            )
    parts.append(_facts(facts))
    by_run: dict[str, list[tuple[str, Provenance]]] = {}
    for name in measures:
        for source in cell.values[name].sources:
            by_run.setdefault(str(source.run.folder), []).append((name, source))
    for folder, named in by_run.items():
        first = named[0][1]
        facts = [
            ("run", tag("code", folder)),
            ("seed", str(first.seed)),
            ("trained on", first.run.inputs.get("data", "unknown")),
        ]
        facts += [
            (f"{key} (content)", tag("code", value))
            for key, value in sorted(first.run.inputs.items())
            if key != "data"
        ]
        for name, source in named:
            protocol = protocol_id(source.result)
            file = tag("code", str(source.result.path))
            facts.append(
                (
                    f"{name} {source.value:.2f}",
                    join(file, ", protocol ", tag("a", protocol, href=f"#p{protocol}")),
                )
            )
        record = first.record
        facts.append(
            (
                "checkpoint",
                tag(
                    "code",
                    f"step {record.get('step', '?')}, sha256 {record.get('sha256', 'unknown')}",
                ),
            )
        )
        facts.append(
            (
                "versions",
                ", ".join(f"{key} {value}" for key, value in first.result.versions.items()),
            )
        )
        parts.append(_facts(facts))
    return tag("article", *parts, id=place)


def _facts(facts: Sequence[tuple[str, str | Html]]) -> Html:
    return tag(
        "dl", *(element for name, value in facts for element in (tag("dt", name), tag("dd", value)))
    )


def _flat(protocol: Mapping[str, Any]) -> list[tuple[str, str | Html]]:
    """Returns name and value of each entry of a protocol; its options are entries of their own."""
    options = protocol.get("options")
    flat = {
        **{key: value for key, value in protocol.items() if key != "options"},
        **(options if isinstance(options, dict) else {}),
    }
    return [(key, tag("code", shown_value(value))) for key, value in flat.items()]
