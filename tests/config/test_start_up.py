from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "torchvision", "timm", "sklearn", "scipy", "numpy", "pandas", "PIL", "wandb"}
"""Packages that take seconds to import, or that only the work of a command needs."""

TYPED = """
import json, runpy, sys
try:
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
finally:
    names = {name.partition(".")[0] for name in sys.modules}
    print("\\n" + json.dumps(sorted(names)))
"""
"""`python -m MODULE ARGUMENTS`; the last line is the list of all top-level modules in memory."""


def typed(module: str, *arguments: str) -> tuple[str, str, set[str]]:
    """What `python -m module arguments` prints, its errors, and the packages that it imports."""
    code = TYPED.replace("sys.argv[1]", repr(module))
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    out, _, names = done.stdout.rstrip().rpartition("\n")
    return out, done.stderr, set(json.loads(names))


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("", "python -m seed_exp.COMMAND"),
        (" distill studnt=resnet18", "did you mean 'student'?"),
        (" distil", "no command 'distil'; did you mean 'distill'?"),
        (".distill --help", "objective.tau_teacher=0.01"),
        (".distill --cfg job", "tau_teacher: 0.01"),
        (".distill studnt=resnet18", "did you mean 'student'?"),
        (".linear --help", "lrs="),
        (".bench --cfg job", "bank_size: 100000"),
        (".report experiments=tabel1 --help", "python -m seed_exp.report"),
        (".export frmats=1", "did you mean 'formats'?"),
        (".knn", "missing option run"),
        (".plan --help", "--seconds"),
        (".plan tabel1", "did you mean 'table1'?"),
        (".sweep --help", "collect"),
        (".zoo fetch --help", "NAME"),
    ],
)
def test_help_and_errors_of_options_import_none_of_what_the_work_needs(
    line: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, *arguments = f"seed_exp{line}".split(" ")
    out, error, imported = typed(module, *arguments)
    assert printed in out + error
    assert imported & HEAVY == set()


def test_the_list_of_commands_imports_no_hydra() -> None:
    _, _, imported = typed("seed_exp")
    assert "hydra" not in imported


def test_an_import_is_seen() -> None:
    assert typed("PIL.features")[2] & HEAVY == {"PIL"}
