"""The command that shows what is in run folders."""

from __future__ import annotations

import csv
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from seed_exp import distill, knn, linear, pretrain, report
from seed_exp.base.files import write_json
from seed_exp.config.compose import compose
from seed_exp.config.options import to_plain
from seed_exp.config.report_line import as_overrides

DATA = "data=digits data.num_workers=0 device=cpu"
SWEEP = (
    f"{DATA} views=digits tracker=files steps=2 batch_size=32 log_every=1 "
    "knn_bank_size=50 knn_query_size=20"
)
PRETRAIN = f"pretrain {SWEEP} moco.queue_size=64 student=convnet_w2 seed=0,1"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("SEED_DATA", raising=False)


def type_line(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    report.main()


def table() -> list[dict[str, str]]:
    """The rows of the CSV file."""
    return list(csv.DictReader(Path("report/table.csv").read_text().splitlines()))


def a_run(folder: Path) -> None:
    options = to_plain(
        compose("pretrain", ["data=digits", "views=digits", "student=convnet_w2", "steps=10"])
    )
    write_json(
        folder / "config.json",
        {"command": "pretrain", "version": "0.1.0", "options": options, "inputs": {}},
    )


def test_it_writes_a_page_and_three_tables_and_prints_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "here" / "a")
    (tmp_path / "here" / "b").mkdir()
    (tmp_path / "here" / "b" / "config.json").write_text("no json")
    type_line(monkeypatch, "runs=here", "output=there", "title=Digits")
    printed = capsys.readouterr()
    assert printed.out.startswith((tmp_path / "there" / "table.md").read_text())
    assert "The page is there/index.html" in printed.out
    assert printed.err == "warning: here/b/config.json: Expecting value: line 1 column 1 (char 0)\n"
    assert {path.name for path in (tmp_path / "there").iterdir()} == {
        "index.html",
        "table.md",
        "table.tex",
        "table.csv",
    }
    assert "<h1>Digits</h1>" in (tmp_path / "there" / "index.html").read_text()
    assert "step 0/10" in printed.out


def test_folders_without_runs_are_a_report_that_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_line(monkeypatch, "runs=[nowhere,neither]")
    assert (
        capsys.readouterr().err
        == "warning: nowhere: no such folder\nwarning: neither: no such folder\n"
    )


@pytest.mark.parametrize(
    ("line", "sweeps"),
    [
        ("table1 seed=0,1 runs=x", ["distill experiments=table1 seed=0,1"]),
        (
            "runs=x experiments=table1,table1_baseline",
            ["distill experiments=table1", "pretrain experiments=table1_baseline"],
        ),
        (
            "experiments=[table1] 'student=[resnet18,resnet34]'",
            ["distill experiments=table1 'student=[resnet18,resnet34]'"],
        ),
        (
            'table1 scale=small +views.x="it\'s"',
            ["distill experiments=table1 scale=small '+views.x=it'\"'\"'s'"],
        ),
        ("runs=x", None),
    ],
)
def test_an_experiment_and_options_of_its_jobs_are_typed_as_for_the_training(
    line: str, sweeps: list[str] | None
) -> None:
    config = compose("report", as_overrides(shlex.split(line)))
    assert config.sweeps == (sweeps or [])
    assert config.runs == (["x"] if "runs=x" in line else ["runs"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tabel1", "no option 'tabel1' in config group 'experiments'; did you mean"),
        ("rnus=x", "no option 'rnus'; did you mean 'runs'?"),
        ("runs=[]", "runs=[] leaves nothing to report"),
        ("table1 rnus=x", "no option 'rnus'"),
        ("sweeps=['knn run=x']", "'knn'"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    line: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        type_line(
            monkeypatch, *([line] if " '" in line or line.startswith("sweeps") else line.split())
        )
    assert str(ended.value.code).startswith("error")
    assert expected in str(ended.value.code)


def test_every_experiment_can_be_reported_before_anything_was_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report.report(compose("report", as_overrides(["table1,table1_baseline", "runs=[.]"])))
    other = [row for row in table() if row["does_not_compare"] == "published by another method"]
    rows = [row for row in table() if row not in other]
    assert {row["state"] for row in rows} == {"not run"}
    baselines = {
        (row["student"], row["published"])
        for row in other
        if row["setting"] == "sslight without a teacher"
    }
    assert baselines == {("resnet18", "65.7"), ("resnet34", "69.7")}
    (known,) = [
        row
        for row in rows
        if (row["student"], row["setting"], row["measure"])
        == ("resnet18", "teacher moco_v2_r50", "T-1")
    ]
    assert (known["published"], known["does_not_compare"], known["parameters"]) == (
        "57.6",
        "",
        "11176512",
    )
    assert known["commands"] == "python -m seed_exp.distill teacher=moco_v2_r50 experiments=table1"
    assert "python -m seed_exp.pretrain experiments=table1_baseline" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_that_it_shows_fill_the_table() -> None:
    commands: dict[str, Any] = {
        "pretrain": pretrain.pretrain,
        "distill": distill.distill,
        "knn": knn.knn,
        "linear": linear.linear,
    }
    config = compose("report", [f"sweeps=['{PRETRAIN}']"])
    states = []
    for _ in range(3):
        report.report(config)
        rows = table()
        states.append({row["state"] for row in rows})
        for line in {command for row in rows for command in row["commands"].split("; ") if command}:
            _, _, module, *options = shlex.split(line)
            quick = (
                ["epochs=1", "lrs=[1]", "optimizer.milestones=[]"]
                if module.endswith("linear")
                else []
            )
            name = module.removeprefix("seed_exp.")
            commands[name](
                compose(
                    name,
                    [*options, *quick, *(DATA.split()[2:] if name in ("knn", "linear") else [])],
                )
            )
    assert states == [
        {"seed 0: not run; seed 1: not run"},
        {"seed 0: no knn and no linear; seed 1: no knn and no linear"},
        {""},
    ]
    assert {row["n"] for row in rows} == {"2"}
