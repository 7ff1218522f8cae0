"""The commands as functions: the same runs, the same errors, and a process left as it was."""

from __future__ import annotations

import doctest
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from PIL import Image

import seed_exp
from seed_exp.config.compose import compose
from seed_exp.config.from_python import composed, words_of
from seed_exp.config.options import to_plain
from seed_exp.methods.seed import Seed
from seed_exp.python import calls, encoder
from seed_exp.training import distillation

ROOT = Path(__file__).parents[2]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def photo() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (60, 80, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("module", [calls, encoder], ids=lambda module: module.__name__)
def test_the_examples_of_the_docstrings_are_true(module: Any, teacher: Any, run: Any) -> None:
    names = {"seed_exp": seed_exp, "teacher": teacher, "run": run, "photo": photo()}
    done = doctest.testmod(module, extraglobs=names, optionflags=FLAGS)
    assert done.attempted > 0
    assert done.failed == 0


def test_the_page_is_true(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "album").mkdir()
    for number in range(3):
        photo().rotate(90 * number).save(tmp_path / "album" / f"{number}.jpg")
    done = doctest.testfile(str(ROOT / "docs" / "python.md"), False, optionflags=FLAGS)
    assert done.attempted > 10
    assert done.failed == 0


def test_a_call_makes_the_run_that_the_command_makes(
    teacher: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["student=convnet_w2", "teacher=run", f"teacher.checkpoint={teacher.folder}"]
    words += ["data=digits", "views=digits", "tracker=files", "steps=2", "batch_size=32"]
    words += ["objective.queue_size=64", "data.num_workers=0", "device=cpu"]
    words += ["knn_bank_size=100", "knn_query_size=50"]
    assert run.options == to_plain(compose("distill", words))
    before = (run.folder / "metrics.jsonl").read_bytes()
    assert distillation.distill(compose("distill", words)) == run.folder
    assert (run.folder / "metrics.jsonl").read_bytes() == before


# --- what a process keeps -----------------------------------------------------------------------


def state() -> dict[str, Any]:
    """All that a call must leave as it is."""
    loggers = {name: logging.getLogger(name) for name in ("", "seed_exp")}
    return {
        "logging": {
            name: (log.level, log.propagate, list(log.handlers)) for name, log in loggers.items()
        },
        # Not SIGCHLD: torch's DataLoader takes it with the first workers, and hands it on.
        "signals": {
            number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGCHLD}
        },
        "folder": Path.cwd(),
        "hydra": GlobalHydra.instance().hydra,
        "version": VersionBase.instance().getbase(),
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "defaults": (torch.get_default_device(), torch.get_default_dtype()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "tf32": (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
        ),
        "streams": (sys.stdout, sys.stderr, sys.excepthook, sys.argv[:]),
        "running": {
            thread.name for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"
        },
    }


@pytest.mark.parametrize(
    "call",
    [
        lambda distilled, _: distilled(steps=1),
        lambda _, run: seed_exp.linear(
            run, views="linear_digits", epochs=1, lrs=[1], tracker="files", data="digits"
        ),
        lambda _, run: seed_exp.embed(run, output="two.npz"),
        lambda _, run: seed_exp.load(run).features(photo()),
    ],
    ids=["distill", "linear", "embed", "load"],
)
def test_calls_work_twice_in_a_row_and_leave_the_process_as_it_was(
    call: Callable[[Any, Any], Any],
    distilled: Callable[..., Any],
    run: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = state()
    first = call(distilled, run)
    assert state() == before
    second = call(distilled, run)
    assert state() == before
    same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    assert same
    assert capsys.readouterr().out == ""


def test_a_call_that_fails_leaves_the_process_as_it_was(teacher: Any, home: Path) -> None:
    before = state()
    with pytest.raises(ValueError, match="no validation images"):
        seed_exp.knn(teacher, data=home)
    assert state() == before


def test_a_program_that_uses_hydra_itself_keeps_it(run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: 1")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        before = state()
        assert seed_exp.knn(run, ks=[1]).protocol["ks"] == [1]
        assert state() == before
        assert hydra_compose("mine", ["a=2"]) == {"a": 2}


def test_the_stop_button_is_a_keyboard_interrupt_that_says_where_it_goes_on(
    distilled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Seed.loss

    def stop(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(Seed, "loss", loss)
        return loss(*arguments)

    before = state()
    monkeypatch.setattr(Seed, "loss", stop)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 1; .* runs/distill/"):
        distilled(steps=5)
    assert state() == before
    assert distilled(steps=5).metrics[-1]["step"] == 5


def test_one_call_is_one_process(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"torchrun -m seed_exp\.knn"):
        seed_exp.knn(run)


# --- options ------------------------------------------------------------------------------------


def test_values_become_the_words_of_a_command_line(tmp_path: Path) -> None:
    options = {
        "student": ["resnet18", "timm/resnet10t"],
        "optimizer": {"lr": 0.5, "clip_grad_norm": None},
        "views.crops.global.scale": (0.3, np.float64(1)),
        "teacher.checkpoint": tmp_path / "a b,c=1",
        "compile": False,
        "steps": np.int64(3),
    }
    config = composed("distill", {"data": "digits", **options})
    assert list(config.students) == ["resnet18", "resnet10t"]
    assert (config.optimizer.lr, config.optimizer.clip_grad_norm) == (0.5, None)
    assert config.views.crops["global"].scale == [0.3, 1.0]
    assert config.teacher.checkpoint == str(tmp_path / "a b,c=1")
    assert (config.compile, config.steps) == (False, 3)


@pytest.mark.parametrize(
    ("files", "source"),
    [(["a.jpg"], "photos"), (["train/c/a.jpg"], "image_folder"), (["train.tsv"], "tsv")],
)
def test_a_folder_as_data_chooses_the_source_by_its_content(
    tmp_path: Path, files: list[str], source: str
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    for path in (tmp_path, str(tmp_path)):
        assert words_of({"data": path}) == [f"data={source}", f"data.root={tmp_path}"]
    assert words_of({"data": "digits"}) == ["data=digits"]


def test_the_name_of_a_source_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert words_of({"data": "digits"}) == ["data=digits"]
    assert words_of({"data": Path("digits")}) == ["data=photos", "data.root=digits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"studnet": "resnet18"}, "^no option 'studnet'; did you mean 'student'"),
        ({"moco": 1}, "^no option 'moco'"),
        (
            {"optimizer": {"momentun": 1}},
            r"'optimizer\.momentun'; did you mean optimizer\.momentum",
        ),
        ({"student": "resnet1"}, "^no option 'resnet1' in config group 'student'"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr must be positive, got -1"),
        ({"steps": "many"}, "^steps: Value 'many'"),
        ({"steps": object()}, "^steps must be text, a number, .* got object"),
        ({"seed=1 ": 1}, "^no option 'seed=1 '"),
        ({"hydra.mode": "MULTIRUN"}, r"^no option 'hydra\.mode'"),
        ({"student": "a,b"}, "no option 'a,b' in config group 'student'"),
        ({"data": "/not/there"}, "data.root=/not/there does not exist"),
        ({"data": "digit"}, "no option 'digit' in config group 'data'; did you mean 'digits'"),
    ],
)
def test_a_wrong_option_is_a_value_error_as_on_the_command_line(
    options: dict[str, Any], message: str, home: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        seed_exp.distill(**options)


def test_a_run_that_is_not_there_is_said(home: Path) -> None:
    with pytest.raises(ValueError, match="missing option run"):
        composed("knn", {})
    with pytest.raises(FileNotFoundError, match="no run folder or student file nowhere"):
        seed_exp.knn("nowhere", data="digits")


# --- names --------------------------------------------------------------------------------------

BOTH_WAYS = """
import sys
import seed_exp
assert not {"torch", "hydra", "numpy"} & sys.modules.keys()
%s
import types
assert isinstance(seed_exp.distill, types.ModuleType) and callable(seed_exp.distill)
assert seed_exp.distill is sys.modules["seed_exp.distill"]
assert seed_exp.distill.distill is not seed_exp.distill
assert "torch" not in sys.modules
try:
    seed_exp.distill(studnet="x")
except ValueError as error:
    print(error)
from hydra import version
assert version.getbase() is version._UNSPECIFIED_  # a program of somebody else sets its own
"""


@pytest.mark.parametrize(
    "line",
    [
        "seed_exp.distill",
        "import seed_exp.distill",
        "from seed_exp import distill",
        "from seed_exp.distill import main",
    ],
)
def test_a_door_is_one_thing_whoever_imports_it_first(line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOTH_WAYS % line], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("no option 'studnet'; did you mean 'student'?"), done.stderr
    assert done.returncode == 0, done.stderr


def test_the_package_lists_its_doors_and_imports_them_when_asked() -> None:
    assert set(seed_exp.__all__) <= set(dir(seed_exp))
    for name in seed_exp.CALLS:
        assert callable(getattr(seed_exp, name))
        assert getattr(calls, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        seed_exp.distil  # noqa: B018


def test_a_door_shows_the_arguments_of_its_function() -> None:
    import inspect

    assert list(inspect.signature(seed_exp.distill).parameters) == [
        "student",
        "teacher",
        "data",
        "options",
    ]


# --- results ------------------------------------------------------------------------------------


def test_results_hold_paths_and_numbers(run: Any) -> None:
    assert os.fspath(run) == str(run.folder)
    assert run.students == {"convnet_w2": run.folder / "students" / "convnet_w2.safetensors"}
    result = seed_exp.knn(run, ks=[1, 5])
    written = json.loads(result.file.read_text())
    assert written["results"] == result.numbers
    assert result.protocol == written["protocol"]
    embedded = seed_exp.embed(run, output="with.npz", duplicates=0.99, gallery="page.html")
    assert [path.exists() for path in (embedded.file, embedded.gallery, embedded.duplicates)] == [
        True
    ] * 3


@pytest.mark.slow  # each format is read back in a process of its own
def test_export_says_where_its_folders_are(run: Any) -> None:
    exported = seed_exp.export(run, output="out", formats=["torch_export"])
    assert (exported.folders["convnet_w2"] / "README.md").exists()
    assert exported.errors["convnet_w2"]["torch_export"] < 1e-3


def test_results_become_tables_of_pandas(run: Any) -> None:
    pytest.importorskip("pandas")
    assert list(run.dataframe().index) == [row["step"] for row in run.metrics]
    result = seed_exp.knn(run, ks=[1])
    assert result.dataframe().loc["convnet_w2", "knn1_majority"] == pytest.approx(
        result.numbers["convnet_w2"]["knn1_majority"]
    )
    for output in ("table.npz", "table.parquet"):
        frame = seed_exp.embed(run, output=output).dataframe()
        assert list(frame.columns) == ["key", "label", "convnet_w2"]
        assert frame["convnet_w2"][0].shape == (16,)
    assert len(seed_exp.report(output="report").dataframe()) > 0


def test_without_pandas_it_says_what_to_install(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'seed_exp[notebook]'")):
        run.dataframe()
