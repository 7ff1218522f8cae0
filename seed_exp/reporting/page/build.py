"""The report as one HTML page.

It needs no network and no other file, can be read without scripts, and fits any screen and paper.
"""

from __future__ import annotations

from pathlib import Path

from seed_exp import __version__
from seed_exp.reporting.other_results import other_results
from seed_exp.reporting.page.charts import curves_section, parameters_section, pictures_section
from seed_exp.reporting.page.content import PageContent, groups_of, plural
from seed_exp.reporting.page.html import Html, tag
from seed_exp.reporting.page.numbers import cost_section, numbers_section
from seed_exp.reporting.page.tables import others_section, table_section

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content-Security-Policy with which the browser lets nothing leave the page."""


def page(report: PageContent) -> str:
    """Returns the HTML document. The same report gives the same bytes."""
    groups = groups_of(report.tables)
    sections: list[tuple[str, str, Html]] = []
    for index, table in enumerate(report.tables):
        sections.append((f"table{index}", table.title, table_section(index, table)))
    others = [other for table in report.tables for other in other_results(table)]
    sections += [
        ("others", "Other evaluations", others_section(others)),
        ("parameters", "Accuracy against parameters", parameters_section(report)),
        ("curves", "Curves", curves_section(groups)),
        ("pictures", "Pictures of the runs", pictures_section(groups)),
        ("cost", "Cost", cost_section(groups, report.models)),
        ("numbers", "Sources of the numbers", numbers_section(report.tables, others)),
        (
            "problems",
            "Files and folders that could not be read",
            tag("ul", *(tag("li", line) for line in report.problems))
            if report.problems
            else Html(),
        ),
    ]
    shown = [(name, title, content) for name, title, content in sections if content]
    seeds = {run.options.get("seed") for run in report.runs}
    summary = f"{plural(len(report.runs), 'run')} of {plural(len(seeds), 'seed')}."
    toggles = "".join(
        f"body:has(#g{number}:not(:checked)) .g{number}{{display:none}}"
        for number in range(len(groups))
    )
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
        tag(
            "main",
            *(tag("section", tag("h2", title), content, id=name) for name, title, content in shown),
        ),
        tag(
            "footer",
            tag(
                "p", tag("small", f"Written by seed_exp {__version__}, python -m seed_exp.report.")
            ),
        ),
        tag("script", Html((here / "page.js").read_text(encoding="utf-8"))),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"
