"""What README, documentation and project files promise, compared with what they talk about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import seed_exp

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
TEST_LINE = 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest'


def test_the_readme_is_short_and_its_test_line_is_the_one_that_ci_runs() -> None:
    assert len(README.splitlines()) <= 150
    assert TEST_LINE in README
    quiet = TEST_LINE.replace("pip install", "pip install -q")
    assert quiet in (REPOSITORY / ".ci/run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_links_to_files_that_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link.partition("#")[0] for link in links if not re.match(r"https?:|#", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_a_number_in_the_readme_s_table_stands_in_the_page_that_measured_it() -> None:
    _, table, _ = re.split(r"<!-- --8<-- \[\w+:better\] -->", README)
    measured = "".join(
        (REPOSITORY / "docs" / f"{page}.md").read_text()
        for page in ("quickstart", "performance", "objectives")
    )
    cells = [cell for row in re.findall(r"^\| .*\|$", table, re.M) for cell in row.split("|")[2:4]]
    numbers = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w)", " ".join(cells))
    assert len(numbers) >= 15
    stands = r"(?<![\d.,]){}(?!\d|[.,]\d)"
    absent = [n for n in numbers if not re.search(stands.format(re.escape(n)), measured)]
    assert absent == []


def test_ci_on_github_runs_the_same_script_on_the_promised_versions_of_python() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["all"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    project = (REPOSITORY / "pyproject.toml").read_text()
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert job["strategy"]["matrix"]["python"] == promised
    assert f'requires-python = ">={promised[0]}"' in project


def test_the_version_is_the_same_wherever_it_is_written() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    released = re.findall(r"^## (\d\S*) \((\S+)\)", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert citation["version"] == seed_exp.__version__
    assert (seed_exp.__version__, str(citation["date-released"])) == released[0]
