"""The queue's first content, and what a user is told of a queue that does not fit the run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from ranks import Ranks
from torch import Tensor

from seed_exp.config.compose import compose
from seed_exp.config.schema import DistillConfig
from seed_exp.methods.queue import Queue
from seed_exp.training.queue_start import FIRST_EPOCH, first_embeddings, queue_advice, start_queues
from seed_exp.views.recipe import TrainViews

CPU = torch.device("cpu")
RECIPE = ["views=swav_multicrop", "views.crops.global.size=8", "views.crops.local.size=6"]


def config(*words: str, size: int = 100) -> DistillConfig:
    options = ["data=digits", "data.num_workers=0", "student=convnet_w2", "device=cpu", "seed=5"]
    composed: DistillConfig = compose(
        "distill", [*options, *RECIPE, f"objective.queue_size={size}", *words]
    )
    return composed


def embedded(views: TrainViews, images: tiny.Images, index: int, epoch: int) -> dict[str, Tensor]:
    """The teacher's embeddings of the first view of an image, by resolution."""
    out = views.empty(1)
    views.host([images.image(index)], images.labels[[index]], epoch, np.array([index]), out)
    teacher = tiny.teacher().eval()
    return {name: teacher(view[0])[0].detach() for name, view in views.device(out).items()}


def test_the_queue_starts_with_every_image_once_before_any_comes_again() -> None:
    images, options = tiny.Images(40), config(size=100)
    views = TrainViews(options.views, seed=5)
    found = first_embeddings(tiny.teacher(), options, images, CPU)
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {
        "global": (100, tiny.DIM),
        "local": (100, tiny.DIM),
    }
    for number, share in enumerate((40, 40, 20)):
        every = [embedded(views, images, index, FIRST_EPOCH + number) for index in range(40)]
        for name, rows in found.items():
            expected = torch.stack([one[name] for one in every])
            distances = torch.cdist(rows[40 * number : 40 * number + share], expected)
            nearest = distances.min(1)
            assert nearest.values.max() < 1e-3
            assert len(set(nearest.indices.tolist())) == share
            assert nearest.indices.tolist() != sorted(nearest.indices.tolist()), "random images"


def test_it_depends_on_seed_and_images_only() -> None:
    images = tiny.Images(40)
    first = first_embeddings(tiny.teacher(), config(), images, CPU)
    torch.manual_seed(99)
    changed = ["objective.tau_teacher=0.2", "epochs=7", "batch_size=4", "views.crops.local.num=2"]
    tiny.assert_same(first, first_embeddings(tiny.teacher(), config(*changed), images, CPU))
    other = first_embeddings(tiny.teacher(), config("seed=6"), images, CPU)
    assert not torch.equal(first["global"], other["global"])


def started() -> dict[str, Any]:
    queues = {name: Queue(100, tiny.DIM, seed=1) for name in ("global", "local")}
    start_queues(queues, tiny.teacher(), config(), tiny.Images(40), CPU)
    return {name: queue.state_dict() for name, queue in queues.items()}


def test_it_is_the_same_in_one_process_and_in_each_of_two(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(started)
    tiny.assert_same(started(), first)
    tiny.assert_same(first, second)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("objective.queue_size=512 epochs=20", []),
        ("objective.queue_size=2000 epochs=1 batch_size=2000", []),
        (
            "objective.queue_size=65536 epochs=20",
            [
                "65,536 embeddings are of 2,000 images, and each checkpoint has 671 MB of them; "
                "objective.queue_size=1024 holds",
                "puts 35,840 embeddings into it, the other 29,696 stay random vectors, "
                "which no image resembles; choose objective.queue_size=1024, or",
            ],
        ),
        ("objective.queue_size=65536 epochs=20 objective.queue_init=teacher", ["larger than"]),
        ("objective.queue_size=65536 epochs=200", ["larger than"]),
        ("objective.queue_size=65536 batch_size=auto", ["larger than"]),
        ("objective.queue_size=1024 steps=3", ["puts 768 embeddings into it, the other 256 stay"]),
        ("objective=l2 objective.queue_size=1024 steps=3", []),
    ],
)
def test_a_queue_that_does_not_fit_the_run_is_named_with_the_remedy(
    words: str, expected: list[str]
) -> None:
    advice = queue_advice(config(*words.split()), num_images=2000, embedding_dim=1280)
    assert len(advice) == len(expected)
    for sentence, part in zip(advice, expected, strict=True):
        assert part in sentence
