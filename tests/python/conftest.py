from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import seed_exp

TINY: dict[str, Any] = {
    "data": "digits",
    "views": "digits",
    "tracker": "files",
    "steps": 2,
    "batch_size": 32,
    "data.num_workers": 0,
    "device": "cpu",
    "knn_bank_size": 100,
    "knn_query_size": 50,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory, in which this module's tests are."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def teacher(home: Path) -> Any:
    return seed_exp.pretrain(student="convnet_w32", moco={"queue_size": 64}, **TINY)


@pytest.fixture(scope="module")
def distilled(teacher: Any) -> Callable[..., Any]:
    """Distils with these options, and otherwise tiny ones."""
    tiny = {**TINY, "student": "convnet_w2", "objective": {"queue_size": 64}, "teacher": "run"}
    return lambda **changes: seed_exp.distill(**{**tiny, "teacher.checkpoint": teacher, **changes})


@pytest.fixture(scope="module")
def run(distilled: Callable[..., Any]) -> Any:
    return distilled()
