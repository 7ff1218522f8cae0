from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from made_runs import DIGITS, STUDENTS, add_results, make_run

from seed_exp.config.identity import effective_options
from seed_exp.reporting.runs import Run, read_runs

DISTILL = [*DIGITS, STUDENTS, "teacher=moco_v2_r50"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs at different depths, the first with results."""
    make_run(tmp_path / "runs" / "a", "distill", DISTILL)
    add_results(tmp_path / "runs" / "a", {"convnet_w2": (50, 60, 90), "convnet_w32": (70, 80, 95)})
    make_run(
        tmp_path / "runs" / "x" / "y" / "z" / "b",
        "pretrain",
        [*DIGITS, "student=convnet_w2"],
        step=40,
        finished=False,
    )
    return tmp_path / "runs"


def read(*paths: Path) -> tuple[list[Run], list[str]]:
    return read_runs(paths, effective_options)


def test_runs_are_found_at_any_depth_once_and_in_order(folder: Path) -> None:
    exported = folder / "a" / "export" / "convnet_w2" / "config.json"
    exported.parent.mkdir(parents=True)
    exported.write_text('{"architecture": "resnet18"}')  # timm's, not a run's
    runs, problems = read(folder, folder / "x", folder)
    assert [run.folder.name for run in runs] == ["a", "b"]
    assert problems == []
    done, running = runs
    assert done.students == ["convnet_w2", "convnet_w32"]
    assert done.networks["convnet_w2"].parameters == 1626  # without head and statistics
    assert [done.is_done(name) for name in done.students] == [True, True]
    assert done.options["objective.queue_size"] == 512
    assert "run_dir" not in done.options
    assert [
        result.values["convnet_w32"] for result in done.results if result.evaluation == "linear"
    ] == [{"top1": 80, "top5": 95}]
    assert (running.step, running.num_steps("convnet_w2"), running.is_done("convnet_w2")) == (
        40,
        100,
        False,
    )


def test_students_of_a_finished_run_are_done_without_their_files(folder: Path) -> None:
    (folder / "a" / "students" / "convnet_w2.safetensors").unlink()
    (folder / "a" / "students" / "convnet_w32.safetensors").write_bytes(b"damaged")

    def done() -> list[bool]:
        run = read(folder)[0][0]
        return [run.is_done(name) for name in run.students]

    (folder / "a" / "done.json").write_text('{"students": ["convnet_w2", "convnet_w32", "other"]}')
    assert done() == [True, False]
    (folder / "a" / "done.json").write_text('{"students": 3}')
    assert done() == [False, False]
    (folder / "a" / "done.json").unlink()
    assert done() == [False, False]


def test_an_option_that_was_not_there_yet_has_its_default(folder: Path) -> None:
    path = folder / "a" / "config.json"
    content = json.loads(path.read_text())
    del (
        content["options"]["objective"]["tau_student"],
        content["options"]["students"]["convnet_w2"]["hidden_dim"],
    )
    del content["options"]["accumulation"]
    (whole, _), _ = read(folder)
    path.write_text(json.dumps(content))
    (older, _), _ = read(folder)
    assert older.options == whole.options
    assert older.options["objective.tau_student"] == 0.2


def test_the_length_of_a_run_in_epochs_is_known_once_an_epoch_has_a_length(tmp_path: Path) -> None:
    overrides = [
        "data=digits",
        "views=digits",
        STUDENTS,
        "epochs=10",
        "students.convnet_w2.epochs=5",
    ]
    make_run(tmp_path / "new", "pretrain", overrides, step=0, finished=False)
    make_run(tmp_path / "old", "pretrain", overrides, step=30, finished=False)
    (new, old), _ = read(tmp_path)
    assert new.num_steps("convnet_w2") is None
    assert (old.num_steps("convnet_w2"), old.num_steps("convnet_w32")) == (220, 440)


def test_what_is_foreign_or_unreadable_is_one_line_and_nothing_else_is_lost(folder: Path) -> None:
    foreign = {
        "hub": '{"model_type": "vit"}',
        "list": "[1, 2]",
        "binary": "\x00\x01",
        "deep": "[" * 100_000,
        "empty": "",
    }
    foreign["odd"] = json.dumps({"command": "distill", "options": {"students": []}, "inputs": {}})
    for name, text in foreign.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    (folder / "folder" / "config.json").mkdir(parents=True)  # no file at all: nothing to say
    (folder / "a" / "students" / "broken.safetensors").write_bytes(b"no student")
    (folder / "a" / "results" / "knn-1.json").write_text(
        '{"evaluation": "knn", "results": [], "protocol": {}, "versions": {}}'
    )
    (folder / "a" / "results" / "knn-2.json").write_text('{"evaluation": ')
    runs, problems = read(folder, folder / "nowhere")
    assert [(run.folder.name, len(run.networks), len(run.results)) for run in runs] == [
        ("a", 2, 2),
        ("b", 0, 0),
    ]
    assert len(problems) == len(foreign) + 4, problems
    assert all("\n" not in problem and str(folder) in problem for problem in problems)
    assert any("nowhere: no such folder" in problem for problem in problems)


def test_half_a_line_at_the_end_is_no_problem_and_others_are_counted(folder: Path) -> None:
    path = folder / "a" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 110, "lo')
    (run, _), problems = read(folder)
    assert (run.step, problems) == (100, [])
    path.write_text(
        f"no json\n{whole}[]\n"
        + '{"loss": 1}\n{"step": NaN}\n{"step": 110, "convnet_w2/loss": NaN, "lr": 1}\n'
    )
    (run, _), problems = read(folder)
    assert problems == [f"{path}: 4 of 15 lines cannot be read"]
    assert run.metrics[-1] == {"step": 110, "lr": 1}


def test_secrets_are_not_taken_over(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "distill", [*DISTILL, "data.root='https://user:pa55word@host/images'"])
    (run,), _ = read(tmp_path)
    assert run.options["data.root"] == "https://***@host/images"


def test_no_damage_of_any_file_stops_the_others_from_being_read(folder: Path) -> None:
    draw = random.Random(0)
    files = sorted(path for path in (folder / "a").rglob("*") if path.is_file())
    for path in files:
        whole = path.read_bytes()
        for _ in range(12):
            damaged = bytearray(
                whole[: draw.randint(0, len(whole))] if draw.random() < 0.5 else whole
            )
            for _ in range(draw.randint(0, 8) if damaged else 0):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            path.write_bytes(damaged)
            runs, problems = read(folder)
            assert runs[-1].folder.name == "b"
            assert all("\n" not in problem for problem in problems)
        path.write_bytes(whole)
