"""`-m hydra/sweeper=optuna`: the number of a command, and whose study it is."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from seed_exp.config import search
from seed_exp.config.search import begin_search, keep_to_one_command, number_to_optimise

SIX = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6"]
TINY = [
    *("data=digits", "data.num_workers=0", "views=digits", "views.crops.global.num=2"),
    *("student=convnet_w2", "moco.queue_size=64", "batch_size=32", "steps=2", "device=cpu"),
    *("tracker=files", "knn_bank_size=100", "knn_query_size=50"),
]
SPACE = ["optimizer.lr=tag(log,interval(0.003,1))", "moco.temperature=choice(0.07,0.2)"]


def run(folder: Path, command: str, *options: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"seed_exp.{command}", *options]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def test_the_number_of_a_training_is_its_last_accuracy_averaged_over_students(
    tmp_path: Path,
) -> None:
    lines = [
        {"step": 1, "a/knn10": 10.0, "b/knn10": 90.0},
        {"step": 2, "a/loss": 1.0},
        {"step": 3, "a/knn10": 20.0, "b/knn10": 40.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert number_to_optimise("distill", tmp_path) == 30
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "a/loss": 2.0}) + "\n")
    with pytest.raises(ValueError, match="pretrain measured nothing to optimise"):
        number_to_optimise("pretrain", tmp_path)


def test_the_number_of_an_evaluation_is_its_headline_and_nothing_counts_as_zero() -> None:
    measured = {"a/lr1": {"top1": 1.0}, "a": {"top1": 60.0, "top5": 90.0}, "b": {"top1": 70.0}}
    assert number_to_optimise("linear", measured) == 65
    assert number_to_optimise("knn", {"a": {"knn10_majority": float("nan")}}) == 0


@pytest.mark.parametrize("command", ["export", "bench", "report"])
def test_a_command_without_a_number_cannot_be_searched_with(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "find_spec", lambda _: object())
    with pytest.raises(ValueError, match=f"{command} has no number to optimise; choose distill,"):
        begin_search(command, [])


def test_without_the_sweeper_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'seed_exp\[optuna\]'"):
        begin_search("distill", [])


def test_a_search_makes_the_number_large_unless_the_command_line_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "find_spec", lambda _: object())
    words = begin_search("linear", ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=4"])
    assert words[:2] == ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=4"]
    assert {"hydra.sweeper.direction=maximize", "hydra.sweeper.study_name=linear"} < {*words}
    assert [word for word in words if "n_jobs" in word] == ["hydra.sweeper.n_jobs=4"]
    plugin = pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.config")
    theirs = {field.name for field in dataclasses.fields(plugin.OptunaSweeperConf)}
    assert {*search.SETTINGS, "study_name", "storage", "n_trials"} <= theirs


def trial_of(command: str, study: Any) -> None:
    config = {"hydra": {"job": {"config_name": command}, "sweeper": {"storage": "x.db"}}}
    keep_to_one_command(OmegaConf.create(config), study.ask())


def test_a_study_belongs_to_the_command_that_began_it() -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(study_name="lr")
    for _ in range(2):  # two at once
        trial_of("distill", study)
    with pytest.raises(ValueError, match=r"study lr in x\.db is one of distill, not of linear"):
        trial_of("linear", study)
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "RUNNING", "FAIL"]
    other = optuna.create_study(study_name="theirs")
    other.tell(other.ask(), 1.0)
    with pytest.raises(ValueError, match="is one of another program, not of distill"):
        trial_of("distill", other)


@pytest.mark.slow
def test_six_trials_find_the_best_of_six_runs_and_another_command_is_refused(
    tmp_path: Path,
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    storage = f"hydra.sweeper.storage=sqlite:///{tmp_path}/search.db"
    done = run(tmp_path, "pretrain", "-m", *SIX, storage, *SPACE, *TINY)
    assert done.returncode == 0, done.stderr
    found = OmegaConf.load(tmp_path / "runs" / "optimization_results.yaml")
    runs = [path.parent for path in (tmp_path / "runs").glob("pretrain/*/done.json")]
    numbers = {number_to_optimise("pretrain", folder): folder for folder in runs}
    assert 1 < len(runs) <= 6
    assert found.best_value == pytest.approx(max(numbers))
    options = json.loads((numbers[max(numbers)] / "config.json").read_text())["options"]
    assert len(numbers) < len(runs) or options["optimizer"]["lr"] == pytest.approx(
        found.best_params["optimizer.lr"]
    )
    assert "Best value" in done.stderr
    study = "hydra.sweeper.study_name=pretrain"
    done = run(tmp_path, "knn", "-m", *SIX, storage, study, "run=x", "temperature=choice(1,2)")
    assert done.returncode == 1
    assert "study pretrain in sqlite:///" in done.stderr
    assert "is one of pretrain, not of knn" in done.stderr
