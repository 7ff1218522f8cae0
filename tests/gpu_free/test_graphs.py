"""What training compiles: whole graphs, once each, in every run of a process."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from seed_exp.engine import fleet
from seed_exp.engine.fleet import Fleet
from seed_exp.views import photometric
from seed_exp.views.recipe import TrainViews

RESOLUTIONS = 2
EXPECTED = 1 + RESOLUTIONS * 2
"""The device half makes all views; teacher and students have a graph for each resolution.

Students of the same layers share theirs.
"""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts the graphs that are compiled; they run as they are, without a C++ compiler."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    # The way of a GPU, which compiles the device half and asks no tensor how many images are
    # affected.
    monkeypatch.setattr(
        fleet, "device_half", lambda views, *_: torch.compile(views.device, dynamic=False)
    )
    monkeypatch.setattr(photometric, "_apply_to_rows", photometric._apply_and_select)
    torch.compiler.reset()
    counters.clear()
    yield counter
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("num_students", [1, 5])
def test_a_run_compiles_each_network_once_through_epochs_evaluations_and_resuming(
    tmp_path: Path, graphs: CompileCounter, num_students: int
) -> None:
    names = list("abcde")[:num_students]
    config = tiny.fit_config(compile=True, steps=11, eval_every=1)

    def train(source: tiny.Images) -> None:
        method = tiny.seed(names)

        def features(of: Collection[str]) -> dict[str, float]:
            for name in of:
                method.trainable[name].eval().features(torch.ones(3, 3, 8, 8))
            return {}

        tiny.train(method, tmp_path, config, source=source, evaluate=features)

    with pytest.raises(ValueError, match="unplugged"):
        train(tiny.Images(fail_after=8 * 7))
    assert graphs.frame_count == EXPECTED
    train(tiny.Images())  # from a checkpoint, in the second epoch
    assert graphs.frame_count == 2 * EXPECTED
    assert not counters["graph_break"]


@pytest.mark.slow
def test_each_size_of_views_is_compiled_once(graphs: CompileCounter) -> None:
    """Networks of more sizes than torch compiles unasked, each met twice."""
    sizes = range(8, 8 + torch.compiler.config.recompile_limit + 1)
    phases = [[0, *sizes]]
    views, method = TrainViews(tiny.views_config(resolution=phases), 1), tiny.seed()
    config = tiny.replaced(tiny.fit_config(compile=True), optimizer=tiny.optimizer_config())
    trained = Fleet(
        method,
        views,
        config,
        torch.device("cpu"),
        batch_size=4,
        steps_per_epoch=50,
        num_steps={"a": 50},
    )
    room, images = views.empty(4), tiny.Images(4)
    for step in range(2 * len(sizes)):
        batch, indices = room.of_size(views.size_at(step)), np.arange(4)
        views.host([images.image(index) for index in range(4)], indices, 0, indices, batch)
        trained.step(batch, step, measure=False)
    # The device half has a graph for each size of global views; networks one more, of local views.
    assert graphs.frame_count == len(sizes) + 2 * (len(sizes) + 1)
    assert not counters["graph_break"]


def test_every_run_of_a_process_is_compiled(graphs: CompileCounter) -> None:
    """A local sweep runs its jobs in one process."""
    views = TrainViews(tiny.views_config(), 1)
    config = tiny.replaced(tiny.fit_config(compile=True), optimizer=tiny.optimizer_config())
    sizes = range(4, 4 + torch.compiler.config.recompile_limit // 2 + 1)
    compiled = []
    for _ in range(2):
        method, before = tiny.seed(), graphs.frame_count
        Fleet(
            method,
            views,
            config,
            torch.device("cpu"),
            batch_size=4,
            steps_per_epoch=1,
            num_steps={"a": 1},
        )
        for size in sizes:
            method.trainable["a"](torch.zeros(2, 3, size, size))
        compiled.append(graphs.frame_count - before)
    assert compiled == [len(sizes)] * 2
