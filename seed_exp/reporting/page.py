"""The report as one HTML page that needs nothing else: no network, no script to be read, a screen of any size or paper."""

from __future__ import annotations

import base64
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from seed_exp import __version__
from seed_exp.redaction import redact
from seed_exp.reporting.comparison import MEASURES, Cell, Source, Table, Value, protocol_id, shared_protocol
from seed_exp.reporting.formats import measures_text, missing_commands, published_text, value_text
from seed_exp.reporting.html import Html, join, tag
from seed_exp.reporting.other_results import OtherResult, other_results
from seed_exp.reporting.plots import Curve, Point, line_chart, scatter_chart, short, style_of
from seed_exp.reporting.published import Published, network_of, objective_of
from seed_exp.reporting.runs import Run

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What the browser lets the page do: nothing that leaves it."""
LARGEST_PICTURE = 2_000_000
"""Bytes of a picture of a run that the page takes in."""
MOST_PICTURES = 24
CURVES = {
    "loss": "Loss",
    "knn10": "10-NN top-1 during training, %",
    "teacher_cosine": "Cosine of student and teacher",
    "teacher_entropy": "Entropy of the teacher's target, nats",
    "effective_neighbours": "Effective neighbours in the teacher's target",
    "embedding_std": "Standard deviation of the embedding",
    "embedding_rank": "Effective rank of the embedding",
    "grad_norm": "Norm of the gradient",
    "lr": "Learning rate",
    "images_per_s": "Images per second",
    "data_wait_percent": "Time spent waiting for data, %",
    "peak_memory_gib": "Peak memory, GiB",
}
"""Metrics that are drawn, with their titles."""


class Model(NamedTuple):
    """What a network costs, whatever trains it."""

    parameters: int
    flops: int | None
    """Of a forward pass of one evaluation view."""


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    title: str
    tables: Sequence[Table]
    runs: Sequence[Run]
    published: Sequence[Published]
    models: Mapping[str, Model]
    """By network, as far as known."""
    problems: Sequence[str]
    """One line each."""


class _Group(NamedTuple):
    """Runs that are drawn alike: the seeds of a student in a setting."""

    name: str
    members: Sequence[tuple[str, Run]]


def page(report: Report) -> str:
    """The document. The same report gives the same bytes."""
    groups = _groups(report.tables)
    sections: list[tuple[str, str, Html]] = []
    for index, table in enumerate(report.tables):
        sections.append((f"table{index}", table.title, _table_section(index, table)))
    others = [other for table in report.tables for other in other_results(table)]
    sections += [
        ("others", "Other evaluations", _others_section(others)),
        ("parameters", "Accuracy against parameters", _parameters_section(report)),
        ("curves", "Curves", _curves_section(groups)),
        ("pictures", "Pictures of the runs", _pictures_section(groups)),
        ("cost", "Cost", _cost_section(groups, report.models)),
        ("numbers", "Where the numbers come from", _numbers_section(report.tables, others)),
        (
            "problems",
            "What could not be read",
            tag("ul", *(tag("li", line) for line in report.problems)) if report.problems else Html(),
        ),
    ]
    shown = [(name, title, content) for name, title, content in sections if content]
    seeds = {run.options.get("seed") for run in report.runs}
    summary = f"{_plural(len(report.runs), 'run')} of {_plural(len(seeds), 'seed')}."
    toggles = "".join(f"body:has(#g{number}:not(:checked)) .g{number}{{display:none}}" for number in range(len(groups)))
    here = Path(__file__).parent
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", report.title),
        tag("style", Html((here / "page.css").read_text(encoding="utf-8") + toggles)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", report.title),
            tag("p", summary, class_="muted"),
            tag("nav", *(tag("a", title, href=f"#{name}") for name, title, _ in shown)),
        ),
        tag("main", *(tag("section", tag("h2", title), content, id=name) for name, title, content in shown)),
        tag("footer", tag("p", tag("small", f"Written by seed_exp {__version__}, python -m seed_exp.report."))),
        tag("script", Html((here / "page.js").read_text(encoding="utf-8"))),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


# Tables


def _table_section(index: int, table: Table) -> Html:
    width = len(table.measures)
    top = [tag("th", column.label, colspan=width, scope="colgroup") for column in table.columns]
    second = [
        tag("th", name, title=MEASURES[name].meaning, scope="col", class_="first" if name == table.measures[0] else None)
        for _ in table.columns
        for name in table.measures
    ]
    rows = []
    for position, row in enumerate(table.rows):
        size = table.parameters[row]
        cells = [
            tag("th", row, scope="row"),
            tag("td", "" if size is None else short(size), title="" if size is None else f"{size:,}"),
        ]
        for number in range(len(table.columns)):
            cells += _cells(table.cells.get((row, number)), table.measures, _anchor(index, position, number))
        rows.append(tag("tr", *cells))
    head = tag(
        "thead",
        tag("tr", tag("th", ""), tag("th", ""), *top),
        tag("tr", tag("th", "student", scope="col"), tag("th", "parameters", scope="col"), *second),
    )
    box = tag("div", tag("table", head, tag("tbody", *rows)), class_="box", tabindex="0", role="region", aria_label=table.title)
    return join(box, _legend(table), _settings(table), _missing(table))


def _cells(cell: Cell | None, measures: Sequence[str], anchor: str) -> list[Html]:
    if cell is None:
        return [tag("td", class_="first" if name == measures[0] else None) for name in measures]
    values = [cell.values[name] for name in measures]
    if not any(value.sources or value.published for value in values):
        return [tag("td", tag("span", cell.state, class_="state"), colspan=len(measures), class_="first missing")]
    made = []
    for position, value in enumerate(values):
        empty = cell.state if position == 0 else "–"
        parts = [_ours(value, anchor)] if value.sources else [tag("span", empty or "–", class_="state")]
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
    hover = "\n".join(f"seed {source.seed}: {source.value:.2f}, {source.result.path}" for source in value.sources)
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
    difference = tag("span", f"{value.difference:+.1f}".replace("-", "−"), class_="better" if value.difference >= 0 else "worse")
    return tag("small", f"({shown}, ", difference, ")", title=value.published.source)


def _legend(table: Table) -> Html:
    values = [value for cell in table.cells.values() for value in cell.values.values()]
    lines: list[str | Html] = ["; ".join(f"{name}: {MEASURES[name].meaning}" for name in table.measures) + "; all in percent."]
    if any(value.spread is not None for value in values):
        lines.append("± is the standard deviation over n training seeds.")
    if any(value.published and not value.reasons for value in values):
        lines.append("In parentheses: the published number, and ours less it in points.")
    if reasons := dict.fromkeys(reason for value in values if value.published for reason in value.reasons):
        lines.append(
            tag(
                "span",
                f"[Grey]: published, for reference only. It does not compare with ours: {'; '.join(reasons)}.",
                class_="reference",
            )
        )
    return tag("ul", *(tag("li", line) for line in [*lines, *table.notes]), class_="muted")


def _others_section(others: Sequence[OtherResult]) -> Html:
    """What stands in no cell of a table."""
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
    table = tag("table", tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header))), tag("tbody", *rows))
    return tag("div", table, class_="box", tabindex="0", role="region", aria_label="Other evaluations")


def _files(other: OtherResult) -> list[str]:
    return list(dict.fromkeys(str(source.result.path) for value in other.values.values() for source in value.sources))


def _settings(table: Table) -> Html:
    """What exactly the columns differ in."""
    names = sorted({name for column in table.columns for name in column.options})
    if not names:
        return Html()
    head = tag("tr", tag("th", "option", scope="col"), *(tag("th", column.label, scope="col") for column in table.columns))
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", tag("code", _shown(column.options[name]))) for column in table.columns),
        )
        for name in names
    ]
    box = tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="box")
    return tag("details", tag("summary", f"What the columns differ in: {_plural(len(names), 'option')}"), box)


def _missing(table: Table) -> Html:
    commands = missing_commands(table)
    if not commands:
        return Html()
    lines = [join(tag("small", state), tag("pre", command)) for command, state in commands.items()]
    return tag(
        "details", tag("summary", f"Missing: {_plural(len(commands), 'command')} would fill it"), *lines, open=len(commands) <= 3
    )


# Diagrams


def _parameters_section(report: Report) -> Html:
    """Figure 1 of the paper: ours; the published one beside it, in the same diagram only where numbers compare."""
    charts = []
    for table in report.tables:
        points, theirs = [], []
        for name in ("T-1", "K"):
            for (row, number), cell in table.cells.items():
                value, size = cell.values[name], table.parameters[row]
                if value.mean is not None and size:
                    points.append(Point(row, f"ours, {table.columns[number].label}", number, size, value.mean, row))
                    if value.published is not None and not value.reasons:
                        theirs.append(
                            Point(row, f"published, {table.columns[number].label}", 7, size, value.published.value, f"{row} ")
                        )
            if points:
                legend = _marks(
                    {number: column.label for number, column in enumerate(table.columns)} | ({7: "published"} if theirs else {})
                )
                chart = scatter_chart(
                    f"{table.title}: {MEASURES[name].meaning}, %", [*points, *theirs], "parameters of the encoder"
                )
                charts.append(tag("div", chart, legend))
                break
    if figure := _figure_1(report):
        charts.append(figure)
    return tag("div", *charts, class_="charts pair") if charts else Html()


def _figure_1(report: Report) -> Html:
    origins: dict[str, int] = {}
    points = []
    for row in report.published:
        of_paper = (
            row.source.startswith("SEED") and row.protocol == "linear_top1" and (row.objective == "seed" or not row.teacher)
        )
        if of_paper and row.student in report.models:
            origin = f"SEED from {row.teacher}, {row.teacher_ssl}" if row.teacher else f"no teacher ({row.objective})"
            group = origins.setdefault(origin, len(origins))
            points.append(Point(row.student, origin, group, report.models[row.student].parameters, row.value, row.student))
    if not points:
        return Html()
    datasets = ", ".join(sorted({row.dataset for row in report.published}))
    note = tag("p", f"Published numbers, all for {datasets}; they say nothing about runs on other images.", class_="muted")
    chart = scatter_chart(f"Published (SEED, {datasets}): linear evaluation, top-1, %", points, "parameters of the encoder")
    return tag("div", chart, _marks({group: name for name, group in origins.items()}), note)


def _marks(names: Mapping[int, str]) -> Html:
    shapes = [
        tag("label", tag("svg", tag("circle", cx=13, cy=4, r=4, class_=f"point {style_of(group)}"), aria_hidden="true"), name)
        for group, name in names.items()
    ]
    return tag("div", *shapes, class_="legend")


def _curves_section(groups: Sequence[_Group]) -> Html:
    charts = []
    for metric, title in CURVES.items():
        for name, curves in _by_objective(metric, groups).items():
            charts.append(line_chart(f"{title}{name}", curves))
    if not charts:
        return Html()
    drawn = [
        tag(
            "label",
            tag("input", type="checkbox", id=f"g{number}", checked=True),
            tag("svg", tag("path", d="M0 4H26", class_=f"curve {style_of(number)}"), viewBox="0 0 26 8", aria_hidden="true"),
            group.name,
        )
        for number, group in enumerate(groups)
    ]
    legend = tag("fieldset", *drawn, class_="legend", aria_label="Curves to show")
    return join(legend, tag("div", *charts, class_="charts"))


def _by_objective(metric: str, groups: Sequence[_Group]) -> dict[str, list[Curve]]:
    """The curves of a metric; losses of different objectives are different quantities, which have diagrams of their own."""
    found: dict[str, list[Curve]] = {}
    for number, group in enumerate(groups):
        for student, run in group.members:
            rows = [*run.metrics, *run.speed]
            points = [(row["step"], row[key]) for row in rows for key in (f"{student}/{metric}", metric) if key in row]
            if points:
                objective = objective_of(run.command, run.options)
                name = f", {objective}" if metric == "loss" else ""
                seed = f", seed {run.options.get('seed')}" if len(group.members) > 1 else ""
                x, y = zip(*points, strict=True)
                found.setdefault(name, []).append(Curve(f"{group.name}{seed}", number, x, y))
    return found


def _pictures_section(groups: Sequence[_Group]) -> Html:
    """What training drew: views, maps of the embeddings. Of several seeds the first."""
    figures: list[Html] = []
    seen: set[Path] = set()
    left_out = 0
    for group in groups:
        for _, run in group.members[:1]:
            for path in run.pictures:
                if path in seen:
                    continue
                seen.add(path)
                content = _picture(path)
                if content is None or len(figures) == MOST_PICTURES:
                    left_out += 1
                    continue
                caption = redact(f"{path.relative_to(run.folder / 'media').with_suffix('')}: {group.name}")
                source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
                figures.append(tag("figure", tag("figcaption", caption), tag("img", src=source, alt=caption, loading="lazy")))
    note = tag("p", f"{_plural(left_out, 'more picture')} in the run folders.", class_="muted") if left_out else Html()
    return join(tag("div", *figures, class_="charts"), note) if figures else note


def _picture(path: Path) -> bytes | None:
    try:
        if path.stat().st_size > LARGEST_PICTURE:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    return content if content.startswith(b"\x89PNG\r\n\x1a\n") else None


# Cost


def _cost_section(groups: Sequence[_Group], models: Mapping[str, Model]) -> Html:
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
            peak = max((row["peak_memory_gib"] for row in run.speed if "peak_memory_gib" in row), default=None)
            size = network.parameters if network else model.parameters if model else None
            cells: list[tuple[str, Any]] = [
                (str(run.options.get("seed")), run.options.get("seed")),
                (f"{run.step:,}", run.step),
                (f"{statistics.median(rates):,.0f}" if rates else "–", statistics.median(rates) if rates else -1),
                (f"{statistics.median(waits):.0f} %" if waits else "–", statistics.median(waits) if waits else -1),
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
        "Images per second and waiting are medians over a run; training is the time of its steps alone. "
        "The students of a fleet share a run and its cost."
    )
    return join(tag("div", table, class_="box", tabindex="0", role="region", aria_label="Cost"), tag("p", note, class_="muted"))


def training_seconds(run: Run) -> float | None:
    """Time of the steps that were logged, from their rates; None where the batch size or the rates are not known."""
    batch_size = run.options.get("batch_size")
    if not isinstance(batch_size, int):
        return None
    steps = [0.0, *(row["step"] for row in run.speed)]
    spans = zip(steps, run.speed, strict=False)
    seconds = [
        (row["step"] - before) * batch_size / row["images_per_s"] for before, row in spans if row.get("images_per_s", 0) > 0
    ]
    return sum(seconds) if seconds else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


# Where numbers come from


def _anchor(table: int, row: int, column: int) -> str:
    return f"t{table}r{row}c{column}"


def _numbers_section(tables: Sequence[Table], others: Sequence[OtherResult]) -> Html:
    """An article for each cell, and the protocols that they name."""
    articles = []
    protocols = {other.protocol: value.sources[0] for other in others for value in other.values.values()}
    for index, table in enumerate(tables):
        for (row, number), cell in table.cells.items():
            sources = {name: cell.values[name].sources for name in table.measures}
            if any(sources.values()):
                protocols |= {protocol_id(source.result): source for same in sources.values() for source in same}
                place = _anchor(index, table.rows.index(row), number)
                articles.append(_article(place, f"{row}, {table.columns[number].label}", cell, table.measures))
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


def _article(place: str, title: str, cell: Cell, measures: Sequence[str]) -> Html:
    parts = [tag("h3", title)]
    facts: list[tuple[str, str | Html]] = []
    for name in measures:
        value = cell.values[name]
        ours = f"{value_text(value) or '–'} ({', '.join(f'{source.value:.2f}' for source in value.sources)})"
        facts.append((name, ours))
        if value.published is not None:
            against = f"; does not compare: {'; '.join(value.reasons)}" if value.reasons else ""
            facts.append((f"{name} published", f"{published_text(value.published)}, {value.published.source}{against}"))
    parts.append(_facts(facts))
    by_run: dict[str, list[tuple[str, Source]]] = {}
    for name in measures:
        for source in cell.values[name].sources:
            by_run.setdefault(str(source.run.folder), []).append((name, source))
    for folder, named in by_run.items():
        first = named[0][1]
        facts = [("run", tag("code", folder)), ("seed", str(first.seed)), ("trained on", first.run.inputs.get("data", "unknown"))]
        facts += [(f"{key} (content)", tag("code", value)) for key, value in sorted(first.run.inputs.items()) if key != "data"]
        for name, source in named:
            protocol = protocol_id(source.result)
            file = tag("code", str(source.result.path))
            facts.append((f"{name} {source.value:.2f}", join(file, ", protocol ", tag("a", protocol, href=f"#p{protocol}"))))
        record = first.record
        facts.append(("checkpoint", tag("code", f"step {record.get('step', '?')}, sha256 {record.get('sha256', 'unknown')}")))
        facts.append(("versions", ", ".join(f"{key} {value}" for key, value in first.result.versions.items())))
        parts.append(_facts(facts))
    return tag("article", *parts, id=place)


def _facts(facts: Sequence[tuple[str, str | Html]]) -> Html:
    return tag("dl", *(element for name, value in facts for element in (tag("dt", name), tag("dd", value))))


def _flat(protocol: Mapping[str, Any]) -> list[tuple[str, str | Html]]:
    """Options first by name, as they are written on a command line."""
    options = protocol.get("options")
    flat = {
        **{key: value for key, value in protocol.items() if key != "options"},
        **(options if isinstance(options, dict) else {}),
    }
    return [(key, tag("code", _shown(value))) for key, value in flat.items()]


def _groups(tables: Sequence[Table]) -> list[_Group]:
    """The cells with runs; a run that several tables show is drawn once."""
    groups = []
    seen: set[tuple[str, str]] = set()
    for table in tables:
        for (row, number), cell in table.cells.items():
            members = [(name, run) for name, run in cell.runs if (name, str(run.folder)) not in seen]
            seen |= {(name, str(run.folder)) for name, run in members}
            if members:
                label = f"{row}, {table.columns[number].label}" if len(table.columns) > 1 else row
                groups.append(_Group(label, members))
    return groups


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _plural(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
