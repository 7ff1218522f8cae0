"""Sections of the page with diagrams: accuracy against parameters, curves, pictures of the runs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from seed_exp.base.redaction import redact
from seed_exp.reporting.page.content import Group, PageContent, plural
from seed_exp.reporting.page.html import Html, join, tag
from seed_exp.reporting.page.plots import Curve, Point, line_chart, scatter_chart, style_of
from seed_exp.reporting.published import objective_of
from seed_exp.reporting.table_cells import MEASURES

LARGEST_PICTURE = 2_000_000
"""Size in bytes up to which a picture of a run is put on the page."""
MOST_PICTURES = 24
"""Number of pictures of runs on the page."""
CURVES = {
    "loss": "Loss",
    "knn10": "10-NN top-1 during training, %",
    "knn10_ema": "10-NN top-1 of averages during training, %",
    "teacher_cosine": "Cosine of student and teacher",
    "teacher_entropy": "Entropy of the teacher's target, nats",
    "effective_neighbours": "Effective neighbours in the teacher's target",
    "tau_teacher": "Temperature of the teacher, where it is calibrated",
    "embedding_std": "Standard deviation of the embedding",
    "embedding_rank": "Effective rank of the embedding",
    "grad_norm": "Norm of the gradient",
    "lr": "Learning rate",
    "view_size": "Side of global views, pixels",
    "images_per_s": "Images per second",
    "data_wait_percent": "Time spent waiting for data, %",
    "peak_memory_gib": "Peak memory, GiB",
}
"""Metrics that are drawn as curves, with their titles."""


def parameters_section(report: PageContent) -> Html:
    """Returns Figure 1 of the paper with our numbers and, beside it, with the published ones.

    A published number also stands in our diagram if the two can be compared.
    """
    charts = []
    for table in report.tables:
        points, theirs = [], []
        for name in ("T-1", "K"):
            for (row, number), cell in table.cells.items():
                value, size = cell.values[name], table.parameters[row]
                if value.mean is not None and size:
                    points.append(
                        Point(
                            row,
                            f"ours, {table.columns[number].label}",
                            number,
                            size,
                            value.mean,
                            row,
                        )
                    )
                    if value.published is not None and not value.reasons:
                        theirs.append(
                            Point(
                                row,
                                f"published, {table.columns[number].label}",
                                7,
                                size,
                                value.published.value,
                                f"{row} ",
                            )
                        )
            if points:
                legend = _marks(
                    {number: column.label for number, column in enumerate(table.columns)}
                    | ({7: "published"} if theirs else {})
                )
                chart = scatter_chart(
                    f"{table.title}: {MEASURES[name].meaning}, %",
                    [*points, *theirs],
                    "parameters of the encoder",
                )
                charts.append(tag("div", chart, legend))
                break
    if figure := _figure_1(report):
        charts.append(figure)
    return tag("div", *charts, class_="charts pair") if charts else Html()


def _figure_1(report: PageContent) -> Html:
    origins: dict[str, int] = {}
    points = []
    for row in report.published:
        of_paper = (
            row.source.startswith("SEED")
            and row.protocol == "linear_top1"
            and (row.objective == "seed" or not row.teacher)
        )
        if of_paper and row.student in report.models:
            origin = (
                f"SEED from {row.teacher}, {row.teacher_ssl}"
                if row.teacher
                else f"no teacher ({row.objective})"
            )
            group = origins.setdefault(origin, len(origins))
            points.append(
                Point(
                    row.student,
                    origin,
                    group,
                    report.models[row.student].parameters,
                    row.value,
                    row.student,
                )
            )
    if not points:
        return Html()
    image_sets = ", ".join(sorted({row.dataset for row in report.published}))
    note = tag(
        "p",
        f"Published numbers, all for {image_sets}; they say nothing about runs on other images.",
        class_="muted",
    )
    chart = scatter_chart(
        f"Published (SEED, {image_sets}): linear evaluation, top-1, %",
        points,
        "parameters of the encoder",
    )
    return tag("div", chart, _marks({group: name for name, group in origins.items()}), note)


def _marks(names: Mapping[int, str]) -> Html:
    shapes = [
        tag(
            "label",
            tag(
                "svg",
                tag("circle", cx=13, cy=4, r=4, class_=f"point {style_of(group)}"),
                aria_hidden="true",
            ),
            name,
        )
        for group, name in names.items()
    ]
    return tag("div", *shapes, class_="legend")


def curves_section(groups: Sequence[Group]) -> Html:
    """Returns the curves of training, a diagram per metric, and boxes that switch groups off."""
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
            tag(
                "svg",
                tag("path", d="M0 4H26", class_=f"curve {style_of(number)}"),
                viewBox="0 0 26 8",
                aria_hidden="true",
            ),
            group.name,
        )
        for number, group in enumerate(groups)
    ]
    legend = tag("fieldset", *drawn, class_="legend", aria_label="Curves to show")
    return join(legend, tag("div", *charts, class_="charts"))


def _by_objective(metric: str, groups: Sequence[Group]) -> dict[str, list[Curve]]:
    """Returns the curves of a metric, by a suffix for the title of their diagram.

    The loss has a diagram per objective, because losses of different objectives are different
    quantities. Any other metric has one diagram, whose suffix is empty.
    """
    found: dict[str, list[Curve]] = {}
    for number, group in enumerate(groups):
        for student, run in group.members:
            rows = [*run.metrics, *run.speed]
            points = [
                (row["step"], row[key])
                for row in rows
                for key in (f"{student}/{metric}", metric)
                if key in row
            ]
            if points:
                objective = objective_of(run.command, run.options)
                name = f", {objective}" if metric == "loss" else ""
                seed = f", seed {run.options.get('seed')}" if len(group.members) > 1 else ""
                x, y = zip(*points, strict=True)
                found.setdefault(name, []).append(Curve(f"{group.name}{seed}", number, x, y))
    return found


def pictures_section(groups: Sequence[Group]) -> Html:
    """Returns the pictures of views and embeddings that the first run of each group drew."""
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
                caption = redact(
                    f"{path.relative_to(run.folder / 'media').with_suffix('')}: {group.name}"
                )
                source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
                figures.append(
                    tag(
                        "figure",
                        tag("figcaption", caption),
                        tag("img", src=source, alt=caption, loading="lazy"),
                    )
                )
    note = (
        tag("p", f"{plural(left_out, 'more picture')} in the run folders.", class_="muted")
        if left_out
        else Html()
    )
    return join(tag("div", *figures, class_="charts"), note) if figures else note


def _picture(path: Path) -> bytes | None:
    try:
        if path.stat().st_size > LARGEST_PICTURE:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    return content if content.startswith(b"\x89PNG\r\n\x1a\n") else None
