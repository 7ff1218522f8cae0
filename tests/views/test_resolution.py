"""Views whose size changes over time: which size when, the same pixels, the same bits again."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from seed_exp.config.compose import compose
from seed_exp.config.schema.resolution import size_at
from seed_exp.data.loader import load_batches
from seed_exp.data.order import SampleOrder
from seed_exp.views.recipe import HostBatch, TrainViews

PHASES = [[0, 8], [2, 14], [3, 9, 14, 11]]
TABLE = [8, 8, 14, 9, 14, 11, 9, 14, 11, 9]
"""Size in each epoch."""


def test_each_epoch_has_the_size_of_its_phase_and_the_sizes_of_a_phase_take_turns() -> None:
    config = tiny.views_config(resolution=PHASES)
    assert [config.size_at(time) for time in range(10)] == TABLE
    assert [size_at([[0, 56], [10, 84]], time) for time in (0, 9, 10, 1000)] == [56, 56, 84, 84]
    assert (config.global_sizes, config.sizes) == ([8, 9, 11, 14], [6, 8, 9, 11, 14])
    plain = tiny.views_config()
    assert (plain.size_at(0), plain.size_at(7), plain.global_sizes) == (8, 8, [8])
    assert plain.of_size(8) is plain.largest() is plain


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_has_the_pixels_of_a_run_with_views_of_its_size_alone(num_workers: int) -> None:
    images: Any = tiny.Images(19)
    order = SampleOrder(19, 8, seed=3)
    steps = range(2 * len(TABLE))  # two steps an epoch
    config = tiny.views_config(resolution=PHASES, mixup=True, blur_prob=0.5)
    views = TrainViews(config, seed=5)
    shapes = [partial(HostBatch.of_size, size=views.size_at(step // 2)) for step in steps]
    found = load_batches(
        images, views, map(order.batch, steps), num_workers=num_workers, shapes=shapes
    )
    for step, batch in zip(steps, found, strict=True):
        crops = {
            **config.crops,
            "global": tiny.replaced(config.crops["global"], size=TABLE[step // 2]),
        }
        alone = TrainViews(tiny.replaced(config, crops=crops, resolution=None), seed=5)
        (expected,) = load_batches(images, alone, [order.batch(step)], num_workers=0)
        assert batch.views["global"].shape[-1] == TABLE[step // 2]
        for one, other in zip(batch.views.values(), expected.views.values(), strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()  # a GPU gets it in one copy
        tiny.assert_same(batch.draws, expected.draws)
        tiny.assert_same(views.device(batch), alone.device(expected))


class Sizes:
    """Records the side of the views that a student sees in each step, of the global ones."""

    def __init__(self, method: Any) -> None:
        self.seen: list[int] = []
        encoder = method.trainable["a"].encoder
        encoder.register_forward_pre_hook(lambda _, inputs: self.seen.append(inputs[0].shape[-1]))


@pytest.mark.parametrize("method", ["seed", "moco"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("length", "phases", "sizes"),
    [
        ({"steps": 12}, [[0, 8], [4, 12], [9, 10, 8]], [8] * 4 + [12] * 5 + [10, 8, 10]),
        ({"steps": None, "epochs": 3}, [[0, 8], [1, 12, 10]], [8] * 5 + [12] * 5 + [10] * 5),
    ],
)
def test_a_run_interrupted_in_the_middle_of_a_phase_goes_on_bit_for_bit(
    method: str,
    num_workers: int,
    length: dict[str, Any],
    phases: list[list[int]],
    sizes: list[int],
    tmp_path: Path,
) -> None:
    config = tiny.fit_config(**length)

    def train(folder: str, fail_after: int | None = None) -> Any:
        trained = getattr(tiny, method)(["a"], dropout=0.3)
        seen = Sizes(trained)
        source = tiny.Images(fail_after=fail_after)
        workers = num_workers if fail_after is None else 0
        tiny.train(
            *(trained, tmp_path / folder, config),
            source=source,
            num_workers=workers,
            resolution=phases,
        )
        return trained, seen.seen

    straight, seen = train("straight")
    in_step = seen[::2] if method == "seed" else seen  # local views are another pass
    assert in_step == sizes
    with pytest.raises(ValueError, match="unplugged"):
        train("broken", fail_after=8 * 7 + 3)
    resumed, seen = train("broken")
    assert 0 < len(seen) < len(sizes) * (2 if method == "seed" else 1)
    tiny.assert_same(
        tiny.last_checkpoint(tmp_path / "straight"), tiny.last_checkpoint(tmp_path / "broken")
    )
    tiny.assert_same(tiny.weights(straight), tiny.weights(resumed))
    lines = [tmp_path / folder / "metrics.jsonl" for folder in ("straight", "broken")]
    assert lines[0].read_bytes() == lines[1].read_bytes()
    logged = [json.loads(line) for line in lines[0].read_text().splitlines()]
    shown = {line["step"]: line["view_size"] for line in logged if "view_size" in line}
    assert shown == {step: sizes[step - 1] for step in shown}
    assert len(set(shown.values())) == len(set(sizes))


BASE = ["student=convnet_w2", "data=digits", "views=digits"]


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("distill", ["views.resolution=[]"], "views.resolution=[] has no size"),
        ("distill", ["views.resolution=[24,32]"], "of whole numbers, such as"),
        ("distill", ["views.resolution=[[0,24],[10]]"], "of whole numbers, such as"),
        ("distill", ["views.resolution=[[0,24.5]]"], "of whole numbers, such as"),
        ("distill", ["views.resolution=[[5,24]]"], "must begin at 0 and one after another"),
        ("distill", ["views.resolution=[[0,24],[9,32],[9,24]]"], "one after another, got [0, 9"),
        ("distill", ["views.resolution=[[0,7,32]]"], "must be at least 8 pixels, got 7"),
        (
            "distill",
            ["views.resolution=[[0,24],[20,32]]", "epochs=20"],
            "begins a phase at 20, but the run has epochs=20: let the phase begin earlier",
        ),
        (
            "pretrain",
            ["views.resolution=[[0,24],[300,32]]", "steps=280"],
            "at 300, but the run has steps=280; a run of steps=N counts in steps:",
        ),
        (
            "distill",
            ["views.resolution=[[0,24],[18,24,28,32]]", "epochs=20"],
            "[18, 24, 28, 32] of views.resolution has 2 epochs for its 3 sizes",
        ),
        ("linear", ["run=x", "views.resolution=[[0,24]]"], "linear takes views of one size"),
        ("finetune", ["run=x", "views.resolution=[[0,24]]"], "finetune takes views of one size"),
        ("bench", ["bench=step", "views.resolution=[[0,24]]"], "bench takes views of one size"),
    ],
)
def test_phases_that_cannot_be_are_refused_in_one_line(
    command: str, words: list[str], message: str
) -> None:
    base = [] if command in ("linear", "finetune") else BASE
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        compose(command, [*base, *words])
    assert "\n" not in str(caught.value)
