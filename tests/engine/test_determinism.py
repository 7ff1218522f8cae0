"""deterministic=true reaches torch, cuDNN and compiled code, and no later run of the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch._inductor import config as inductor
from torch.utils import deterministic as fill

from seed_exp.config.compose import compose
from seed_exp.engine.determinism import algorithms
from seed_exp.training import pretraining


def state() -> dict[str, Any]:
    return {
        "operations": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "fastest": torch.backends.cudnn.benchmark,
        "compiled": inductor.deterministic,
        "fills": fill.fill_uninitialized_memory,
    }


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_training_takes_the_algorithms_of_its_option_and_leaves_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        pretraining, "finish", lambda *_: seen.append(state())
    )  # in the run, after its training
    before = state()
    options = ["data=digits", "views=digits", "views.crops.global.num=2", "student=convnet_w2"]
    options += ["moco.queue_size=64", "batch_size=8", "steps=1", "device=cpu", "eval_every=0"]
    options += ["data.num_workers=0", "knn_bank_size=8", "knn_query_size=8", "tracker=files"]
    options += [f"run_dir={tmp_path}", f"deterministic={str(deterministic).lower()}"]
    pretraining.pretrain(compose("pretrain", options))
    (during,) = seen
    assert during == {
        "operations": deterministic,
        "cudnn": deterministic,
        "fastest": not deterministic,
        "compiled": deterministic,
        "fills": False,
    }
    assert state() == before


def test_on_a_cpu_the_option_changes_no_bit(tmp_path: Path) -> None:
    config = tiny.fit_config(steps=4)
    for name in ("false", "true"):
        with algorithms(deterministic=name == "true"):
            tiny.train(tiny.seed(["a", "b"]), tmp_path / name, config)
    one, two = (tiny.flat(tiny.last_checkpoint(tmp_path / name)) for name in ("false", "true"))
    tiny.assert_same(one, two)


def test_batches_of_one_shape_get_the_fastest_algorithms_and_others_do_not(tmp_path: Path) -> None:
    method = tiny.seed()
    with algorithms(deterministic=False):
        tiny.train(method, tmp_path / "same", tiny.fit_config(steps=1))
        assert torch.backends.cudnn.benchmark
        method.__class__ = type("Varying", (type(method),), {"fixed_shapes": False})
        tiny.train(method, tmp_path / "other", tiny.fit_config(steps=1))
        assert not torch.backends.cudnn.benchmark
