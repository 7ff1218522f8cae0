"""The tutorial and the notebook, typed as they stand, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- not run -->\n)?```(\w+)\n(.*?)```\n", re.DOTALL)
CHANGING = re.compile(r"\b[0-9a-f]{8,}\b|\d[\d,.:]*")
"""Hashes and numbers, which may be others on another machine."""

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    """Finds this Python as `python`, and this checkout from any folder."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}


def typed(language: str, text: str, folder: Path) -> list[str]:
    command = ["bash", "-euc", text] if language == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}"
    return re.split(r"[\r\n]+", done.stdout)


def masked(line: str) -> str:
    return CHANGING.sub("#", " ".join(line.split()))


def test_the_tutorial_runs_as_typed_and_prints_what_it_shows(tmp_path: Path) -> None:
    printed: list[str] = []
    num_run = num_shown = 0
    for skipped, language, text in BLOCK.findall((REPOSITORY / "docs/tutorial.md").read_text()):
        if language == "text":
            rest = iter([masked(line) for line in printed])
            shown = [line for line in text.splitlines() if line.strip() and line != "..."]
            absent = [line for line in shown if masked(line) not in rest]  # in this order
            assert absent == [], "\n".join(printed)
            num_shown += len(shown)
        elif not skipped:
            printed = typed(language, text, tmp_path)
            num_run += 1
    assert num_run >= 8
    assert num_shown >= 20
    assert (tmp_path / "preview.png").stat().st_size > 10_000


def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a kernel of its own, as Jupyter would run it."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(REPOSITORY / "examples/first_encoder.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    tables = [
        output["data"]["text/plain"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    assert len(tables) == 3
    (accuracy,) = re.findall(r"convnet_w2 +([\d.]+)", tables[1])
    assert float(accuracy) > 60
    said = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "did you mean" in said
