"""The tables of measured experiments, made again from their raw results."""

from __future__ import annotations

from pathlib import Path

import pytest

from seed_exp.config.compose import compose
from seed_exp.tools.report import report

REPOSITORY = Path(__file__).parents[2]
MEASURED = sorted(path.parent for path in REPOSITORY.glob("experiments/measured/*/table.md"))


def test_something_was_measured() -> None:
    assert MEASURED


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_a_report_of_the_raw_results_is_the_table_that_is_shown(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    runs = folder.relative_to(REPOSITORY)
    report(compose("report", [f"runs=[{runs}]", f"output={tmp_path}"]))
    assert (tmp_path / "table.md").read_bytes() == (folder / "table.md").read_bytes()
    pages = "".join(page.read_text() for page in (REPOSITORY / "docs").glob("*.md"))
    assert f"experiments/measured/{folder.name}" in pages
