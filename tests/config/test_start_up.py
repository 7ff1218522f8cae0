from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

HEAVY = {"torch", "torchvision", "timm", "sklearn", "scipy", "numpy", "pandas", "PIL", "wandb"}
"""Packages that take seconds to import, or that only the work of a command needs."""

TYPED = """
import json, os, runpy, sys
for name in sys.argv[1].split():
    __import__(name)
for number, line in enumerate(sys.argv[2:]):
    child = os.fork()
    if child == 0:
        break
    os.waitpid(child, 0)
if child == 0:
    for fd, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{stream}{number}", os.O_WRONLY | os.O_CREAT), fd)
    module, *sys.argv[1:] = line.split(" ")
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        names = {name.partition(".")[0] for name in sys.modules}
        print("\\n" + json.dumps(sorted(names)))
"""
"""`python -m LINE` for each line, in a copy of a process that has imported some modules.

The last line of its output is the list of all top-level modules in memory.
"""


def typed(
    lines: Sequence[str], folder: Path, imported: str = ""
) -> dict[str, tuple[str, str, set[str]]]:
    """What `python -m line` prints, its errors, and the packages in memory at its end."""
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    command = [sys.executable, "-c", TYPED, imported, *lines]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    found = {}
    for number, line in enumerate(lines):
        out, _, names = (folder / f"out{number}").read_text().rstrip().rpartition("\n")
        found[line] = out, (folder / f"err{number}").read_text(), set(json.loads(names))
    return found


LINES = {
    "": "python -m seed_exp.COMMAND",
    " distill studnt=resnet18": "did you mean 'student'?",
    " distil": "no command 'distil'; did you mean 'distill'?",
    ".distill --help": "objective.tau_teacher=0.01",
    ".distill --cfg job": "tau_teacher: 0.01",
    ".distill studnt=resnet18": "did you mean 'student'?",
    ".linear --help": "lrs=",
    ".bench --cfg job": "bank_size: 100000",
    ".report experiments=tabel1 --help": "python -m seed_exp.report",
    ".export frmats=1": "did you mean 'formats'?",
    ".knn": "missing option run",
    ".plan --help": "--seconds",
    ".plan tabel1": "did you mean 'table1'?",
    ".sweep --help": "collect",
    ".zoo fetch --help": "NAME",
}
"""Lines, less `seed_exp`, with words that they print."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, set[str]]]:
    """All of them after one import of Hydra, which every command needs."""
    lines = [f"seed_exp{line}" for line in LINES]
    return typed(lines, tmp_path_factory.mktemp("lines"), "seed_exp.config.command")


@pytest.mark.parametrize("line", LINES)
def test_help_and_errors_of_options_import_none_of_what_the_work_needs(
    line: str, results: dict[str, tuple[str, str, set[str]]]
) -> None:
    out, error, imported = results[f"seed_exp{line}"]
    assert LINES[line] in out + error
    assert imported & HEAVY == set()


def test_the_list_of_commands_imports_no_hydra(tmp_path: Path) -> None:
    assert "hydra" not in typed(["seed_exp"], tmp_path)["seed_exp"][2]


def test_an_import_is_seen(tmp_path: Path) -> None:
    assert typed(["PIL.features"], tmp_path)["PIL.features"][2] & HEAVY == {"PIL"}
