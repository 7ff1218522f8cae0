"""A run goes on in a later version of the package, bit for bit as if nothing had happened."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file
from torch import Tensor

import seed_exp
from seed_exp import pretrain
from seed_exp.config.compose import compose, config_home
from seed_exp.config.schema import PretrainConfig
from seed_exp.data.digits import DigitsSource

WORDS = ["student=convnet_w2", "data=digits", "views=digits", "views.crops.global.num=2"]
WORDS += ["moco.queue_size=64", "batch_size=32", "data.num_workers=0", "device=cpu"]
WORDS += ["tracker=files", "log_every=3", "checkpoint_every=2"]
WORDS += ["knn_bank_size=100", "knn_query_size=50"]


class KilledError(Exception):
    pass


def assert_same_runs(straight: Path, broken: Path) -> None:
    tiny.assert_same(tiny.last_checkpoint(straight), tiny.last_checkpoint(broken))
    assert (straight / "metrics.jsonl").read_bytes() == (broken / "metrics.jsonl").read_bytes()
    student = "students/convnet_w2.safetensors"
    tiny.assert_same(load_file(straight / student), load_file(broken / student))
    assert "resuming after step" in (broken / "log.txt").read_text()


def newer(config: PretrainConfig, value: float = 0.0) -> Any:
    """The config in a version with one more option."""
    schema = dataclasses.make_dataclass(
        "PretrainConfig", [("noise", float, 0.0)], bases=(PretrainConfig,)
    )
    return schema(**vars(config), noise=value)


def test_an_interrupted_run_goes_on_after_an_option_was_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    config = compose("pretrain", [*WORDS, "steps=8"])
    for folder in ("straight", "broken"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "straight")
    straight = pretrain.pretrain(dataclasses.replace(config))

    monkeypatch.chdir(tmp_path / "broken")
    seen, image = [], DigitsSource.image

    def unplugged(source: DigitsSource, index: int) -> Tensor:
        seen.append(index)
        if len(seen) > 32 * 6:
            raise KilledError
        return image(source, index)

    with monkeypatch.context() as patch:
        patch.setattr(DigitsSource, "image", unplugged)
        with pytest.raises(KilledError):
            pretrain.pretrain(dataclasses.replace(config))
    (folder,) = Path("runs/pretrain").iterdir()
    with pytest.raises(ValueError, match=r"noise was 0\.0, now 0\.5\."):
        pretrain.pretrain(newer(dataclasses.replace(config, run_dir=str(folder)), 0.5))
    assert pretrain.pretrain(newer(config)).resolve() == folder.resolve()
    assert folder.name == straight.name
    assert_same_runs(tmp_path / "straight" / straight, folder)


def version(home: Path, *patches: tuple[str, str, str]) -> Path:
    """A copy of the package in which texts of its files are replaced: (glob, pattern, text)."""
    shutil.copytree(
        Path(seed_exp.__file__).parent,
        home / "seed_exp",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for folder in ("conf", "experiments"):
        if not (home / "seed_exp" / folder).exists():  # in a wheel it is inside
            shutil.copytree(config_home() / folder, home / folder)
    for glob, pattern, text in patches:
        changed = 0
        for file in (home / "seed_exp").glob(glob):
            content, count = re.subn(pattern, text, file.read_text())
            file.write_text(content)
            changed += count
        assert changed == 1, f"{changed} matches of {pattern}"
    return home


ADDED = (
    "config/schema/*.py",
    r'(class FitConfig:\n    """(?:.|\n)*?"""\n)',
    r'\1\n    noise: float = 0.0\n    """Standard deviation of nothing."""',
)
CHANGED = ("config/schema/*.py", r"(    max_skipped: int = )10\n", r"\g<1>11\n")
ENTERED = (
    "config/identity.py",
    r"(CHANGED_DEFAULTS: .* = \{\n)",
    r'\1    "FitConfig.max_skipped": ChangedDefault("0.3.0", 10),\n',
)


def pretraining(package: Path, place: Path, *words: str) -> subprocess.Popen[str]:
    place.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "seed_exp.pretrain", *WORDS, *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(package)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(package: Path, place: Path, *words: str) -> set[Path]:
    """The run folders in `place` after the command has succeeded."""
    said, _ = pretraining(package, place, *words).communicate()
    folders = set((place / "runs" / "pretrain").iterdir())
    assert all((folder / "done.json").exists() for folder in folders), said
    return folders


@pytest.mark.slow
def test_a_killed_run_goes_on_in_a_later_version_of_the_package(tmp_path: Path) -> None:
    old = version(tmp_path / "old")
    added = version(tmp_path / "added", ADDED)
    changed = version(tmp_path / "changed", ADDED, CHANGED, ENTERED)

    process = pretraining(old, tmp_path / "broken", "steps=300")
    try:
        found: list[Path] = []
        while process.poll() is None and not found:
            found = list((tmp_path / "broken").glob("runs/pretrain/*/checkpoints/step_*.pt"))
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    folder = found[0].parents[1]
    assert not (folder / "done.json").exists()

    given = ("steps=300", f"run_dir={folder}")
    said, _ = pretraining(added, tmp_path / "broken", *given, "noise=0.5").communicate()
    assert "holds a run with other options: noise was 0.0, now 0.5. Give the old options" in said
    said, _ = pretraining(changed, tmp_path / "broken", *given).communicate()
    assert "holds a run with other options: max_skipped was 10, now 11. Give the old" in said

    assert finished(added, tmp_path / "broken", "steps=300") == {folder}
    (straight,) = finished(old, tmp_path / "straight", "steps=300")
    assert straight.name == folder.name
    assert_same_runs(straight, folder)

    assert finished(changed, tmp_path / "broken", "steps=300", "max_skipped=10") == {folder}
    short = tmp_path / "short"
    (first,) = finished(old, short, "steps=1")
    (second,) = finished(changed, short, "steps=1") - {first}
    assert second.name.rpartition("-")[0] == first.name.rpartition("-")[0]
