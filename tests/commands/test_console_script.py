"""`seed-exp COMMAND` is `python -m seed_exp.COMMAND`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seed_exp.__main__ import COMMANDS, main
from seed_exp.config.schema import SCHEMAS


@pytest.fixture(autouse=True)
def _hook_is_put_back() -> Iterator[None]:
    before = sys.excepthook
    yield
    sys.excepthook = before


def typed(patch: pytest.MonkeyPatch, line: str) -> None:
    patch.setattr(sys, "argv", ["/usr/bin/seed-exp", *line.split()])
    main()


def test_a_sweep_runs_each_of_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("seed_exp.training.distillation.distill", configs.append)
    typed(monkeypatch, "distill -m student=resnet18,resnet34 seed=3")
    found = [(list(config.students), config.seed) for config in configs]
    assert found == [(["resnet18"], 3), (["resnet34"], 3)]


def test_it_lists_the_commands_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "")
    assert {f"\n  {name:<12}" for name in COMMANDS} == {
        f"\n  {line[2:14]}"
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  ")
    }
    assert SCHEMAS.keys() <= set(COMMANDS)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("seed-exp dis", "distill"),
        ("seed-exp distill student=resnet3", "student=resnet34"),
        ("seed-exp distill -m seed=0 objective.tau_t", "objective.tau_teacher="),
        ("seed-exp knn data=dig", "data=digits"),
        ("seed-exp knn ", "ks."),
    ],
)
def test_a_shell_completes_commands_and_options(
    line: str, offered: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    with contextlib.suppress(SystemExit):  # after the list of commands
        typed(monkeypatch, "-sc query=bash")
    assert offered in capsys.readouterr().out.split()


@pytest.mark.parametrize("line", ["-sc install=bash", "distill -sc install=bash"])
def test_completion_is_installed_for_the_script(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, line)
    assert capsys.readouterr().out.endswith(" hydra_bash_completion seed-exp\n")


def test_bash_completes_a_typed_line(tmp_path: Path) -> None:
    script = tmp_path / "seed-exp"
    script.write_text(
        f"#!{sys.executable}\nfrom seed_exp.__main__ import main\nmain()\n", encoding="utf-8"
    )
    script.chmod(0o755)
    lines = """eval "$(seed-exp -sc install=bash)"
COMP_WORDS=(seed-exp distill teacher=swav_r50w)
COMP_CWORD=2 COMP_LINE="${COMP_WORDS[*]}" COMP_POINT=${#COMP_LINE}
hydra_bash_completion 2>/dev/null
echo "${COMPREPLY[@]}"
"""
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        ["bash", "-c", lines], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["teacher=swav_r50w2", "teacher=swav_r50w4", "teacher=swav_r50w5"]
