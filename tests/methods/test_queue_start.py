"""The queue's first content, and what a user is told of a queue that does not fit the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from ranks import Ranks
from safetensors.torch import save
from torch import Tensor

from seed_exp.config.compose import compose
from seed_exp.config.schema import OBJECTIVE_CONFIGS, DistillConfig, MocoConfig, SeedConfig
from seed_exp.methods.losses import target_entropy
from seed_exp.methods.seed import Seed
from seed_exp.training import queue_start
from seed_exp.training.advice import length_advice, queue_advice
from seed_exp.training.queue_start import FIRST_EPOCH, first_embeddings, start_from_images
from seed_exp.views.recipe import TrainViews

CPU = torch.device("cpu")
RECIPE = ["views=swav_multicrop", "views.crops.global.size=8", "views.crops.local.size=6"]


def config(*words: str, size: int | str = 100) -> DistillConfig:
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


STARTS = ["objective.queue_init=teacher", "objective.effective_neighbours=7"]


def started(cache: Path | None = None) -> dict[str, Any]:
    options = config(*STARTS)
    method = Seed(
        tiny.students(), tiny.teacher(), options.objective, ["global", "local"], options.seed
    )
    start_from_images(method, tiny.teacher(), options, tiny.Images(40), CPU, cache)
    return {**method.carried.state_dict(), **method.found()}


def test_the_temperature_is_that_of_views_after_those_of_the_queue() -> None:
    found = started()
    rows = first_embeddings(tiny.teacher(), config(*STARTS), tiny.Images(40), CPU, more=256)
    assert torch.equal(found["global.embeddings"], rows["global"][:100])
    entropy = target_entropy(
        rows["global"][100:], rows["global"][:100], tau_teacher=found["tau_teacher"]
    )
    assert entropy.exp().mean().item() == pytest.approx(7, rel=1e-2)
    assert entropy.shape == (256,)


def test_runs_that_share_a_cache_embed_the_images_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    expected = started()
    tiny.assert_same(started(tmp_path), expected)
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(queue_start, "first_embeddings", pytest.fail)
    tiny.assert_same(started(tmp_path), expected)
    monkeypatch.undo()
    whole = kept.read_bytes()
    for damaged in (
        whole[:-100],
        save({"global": torch.ones(356, tiny.DIM)}),
        save({name: torch.full((356, tiny.DIM), torch.nan) for name in ("global", "local")}),
    ):
        kept.write_bytes(damaged)
        logged.clear()
        tiny.assert_same(started(tmp_path), expected)
        assert kept.read_bytes() == whole
        assert "is damaged" in logged[0]


def test_a_pipe_in_the_cache_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "first_356.safetensors")
    tiny.assert_same(started(tmp_path), started())
    assert (tmp_path / "first_356.safetensors").is_file()


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
                "65,536 embeddings are of 2,000 images, each of which is in it about 32.8 times, "
                "and each checkpoint has 671 MB of them; objective.queue_size=512 (that is auto) "
                "holds each image at most once",
                "puts 35,840 embeddings into it, the other 29,696 stay random vectors, "
                "which no image resembles; choose objective.queue_size=512 (that is auto), or",
            ],
        ),
        ("objective.queue_size=65536 epochs=20 objective.queue_init=teacher", ["larger than"]),
        ("objective.queue_size=65536 epochs=200", ["larger than"]),
        ("objective.queue_size=65536 batch_size=auto", ["larger than"]),
        ("objective.queue_size=1024 steps=3", ["puts 768 embeddings into it, the other 256 stay"]),
        ("objective=l2 objective.queue_size=1024 steps=3", []),
        ("epochs=20", []),
    ],
)
def test_a_queue_that_does_not_fit_the_run_is_named_with_the_remedy(
    words: str, expected: list[str]
) -> None:
    options = config(*words.split(), size="auto").sized_for(2000)
    advice = queue_advice(options, num_images=2000, embedding_dim=1280)
    assert len(advice) == len(expected)
    for sentence, part in zip(advice, expected, strict=True):
        assert part in sentence


@pytest.mark.parametrize(
    ("images", "size", "sizes"),
    [
        (1_281_167, 65536, {"compress": 128000, "online_clustering": 3840}),
        (65536, 65536, {"compress": 32768, "binary_contrastive": 16384}),
        (65535, 16384, {}),
        (50000, 16384, {"binary_contrastive": 16384, "online_clustering": 3840}),
        (2000, 512, {"online_clustering": 512}),
        (1023, 256, {}),
        (3, 1, {}),
        (1, 1, {}),
    ],
)
def test_an_automatic_queue_is_the_papers_or_holds_no_image_twice(
    images: int, size: int, sizes: dict[str, int]
) -> None:
    assert SeedConfig().sized_for(images).queue_size == size
    assert MocoConfig().sized_for(images).queue_size == size
    assert SeedConfig(queue_size=7).sized_for(images).queue_size == 7
    for name, expected in sizes.items():
        clusters = {"num_clusters": 1} if "clustering" in name else {}
        objective = OBJECTIVE_CONFIGS[name](**clusters)
        assert objective.sized_for(images).queue_size == expected


def test_more_clusters_than_an_automatic_queue_holds_are_refused_with_the_number() -> None:
    with pytest.raises(ValueError, match=r"num_clusters=3000 exceeds objective\.queue_size=2048"):
        OBJECTIVE_CONFIGS["k_means"]().sized_for(5000)


@pytest.mark.parametrize(
    ("words", "images", "expected"),
    [
        ("epochs=200", 2000, "1,400 steps of 256 images are 200 epochs of 2,000 images; "),
        ("epochs=200", 2000, "recommended for so few are about 14,000 steps (epochs=2000;"),
        ("epochs=1999 batch_size=64", 2000, "about 62,000 steps"),
        ("epochs=2000", 2000, None),
        ("steps=14000", 2000, None),
        ("epochs=200", 50000, "about 78,000 steps (epochs=400;"),
        ("epochs=400", 50000, None),
        ("epochs=200", 99_999, "(epochs=201;"),
        ("epochs=1", 100_000, None),
        ("epochs=1 batch_size=auto", 2000, None),
    ],
)
def test_a_short_training_of_few_images_is_told_the_recommended_steps(
    words: str, images: int, expected: str | None
) -> None:
    (sentence,) = length_advice(config(*words.split()), images) or [None]
    assert sentence is None if expected is None else expected in (sentence or "")
