"""Whatever recipe the config accepts and whatever size an image has, its views are right.

They have finite values and the right size. They are the same each time.
"""

from __future__ import annotations

import numpy as np
import torch
from fuzzing import fuzz
from hypothesis import strategies as st

from seed_exp.config.schema import CropConfig, ViewsConfig
from seed_exp.views.recipe import EvalViews, HostBatch, TrainViews


def ordered(low: float, high: float) -> st.SearchStrategy[list[float]]:
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(sorted)


SHARE = st.just(0.0) | st.just(1.0) | st.floats(0, 1)
CROPS = st.builds(
    CropConfig, size=st.integers(2, 40), num=st.integers(1, 3), scale=ordered(1e-6, 1)
)
RECIPES = st.integers(2, 40).flatmap(
    lambda eval_size: st.builds(
        ViewsConfig,
        name=st.just("any"),
        crops=st.fixed_dictionaries({"global": CROPS}, optional={"local": CROPS, "other": CROPS}),
        aspect_ratio=ordered(1e-3, 1e3),
        jitter=st.tuples(
            *[st.sampled_from([0.0, 1.0]) | st.floats(0, 4)] * 3, st.floats(0, 0.5)
        ).map(list),
        jitter_prob=SHARE,
        grayscale_prob=SHARE,
        grayscale_first=st.booleans(),
        blur_prob=SHARE,
        blur_sigma=ordered(1e-6, 20),
        flip_prob=SHARE,
        eval_size=st.just(eval_size),
        eval_resize=st.integers(eval_size, eval_size + 20),
        mean=st.lists(st.floats(-1, 2), min_size=3, max_size=3),
        std=st.lists(st.floats(0.01, 2), min_size=3, max_size=3),
    )
)
SIZES = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 60))
    | st.sampled_from([(1, 1), (1, 900), (900, 1)]),
    min_size=1,
    max_size=4,
)


def images(sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]


def made(
    views: TrainViews | EvalViews, sizes: list[tuple[int, int]], epoch: int, first: int
) -> tuple[HostBatch, dict[str, torch.Tensor]]:
    batch = views.empty(len(sizes))
    for tensor in (*batch.views.values(), *batch.draws.values()):
        tensor.fill_(77)
    indices = np.arange(first, first + len(sizes))
    views.host(images(sizes), np.arange(len(sizes)), epoch, indices, batch)
    return batch, views.device(batch.map(torch.clone))


@fuzz(
    25,
    config=RECIPES,
    sizes=SIZES,
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
    first=st.integers(0, 2**40),
)
def test_training_views_are_finite_of_the_right_size_and_the_same_each_time(
    config: ViewsConfig, sizes: list[tuple[int, int]], seed: int, epoch: int, first: int
) -> None:
    batch, out = made(TrainViews(config, seed), sizes, epoch, first)
    again_batch, again = made(TrainViews(config, seed), sizes, epoch, first)
    assert out.keys() == config.crops.keys()
    for name, crop in config.crops.items():
        assert batch.views[name].shape == (len(sizes), crop.num, 3, crop.size, crop.size)
        assert torch.equal(batch.views[name], again_batch.views[name])
        assert torch.equal(batch.draws[name], again_batch.draws[name])
        assert out[name].shape == (crop.num, len(sizes), 3, crop.size, crop.size)
        assert out[name].dtype == torch.float32
        assert torch.isfinite(out[name]).all()
        assert torch.equal(out[name], again[name])
        in_range(out[name], config)
    # An image's views do not depend on those beside it.
    alone, _ = made(TrainViews(config, seed), sizes[-1:], epoch, first + len(sizes) - 1)
    if len(sizes) == 1:
        assert all(torch.equal(alone.views[name], batch.views[name]) for name in config.crops)
    assert all(torch.equal(alone.draws[name][0], batch.draws[name][-1]) for name in config.crops)


@fuzz(25, config=RECIPES, sizes=SIZES)
def test_evaluation_views_are_finite_and_of_the_right_size(
    config: ViewsConfig, sizes: list[tuple[int, int]]
) -> None:
    _, out = made(EvalViews(config), sizes, 0, 0)
    assert out["global"].shape == (1, len(sizes), 3, config.eval_size, config.eval_size)
    assert out["global"].dtype == torch.float32
    assert torch.isfinite(out["global"]).all()
    in_range(out["global"], config)
    assert torch.equal(out["global"], made(EvalViews(config), sizes, 5, 9)[1]["global"])


def in_range(views: torch.Tensor, config: ViewsConfig) -> None:
    """Without the normalisation every value lies between black and white."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (config.mean, config.std)
    )
    pixels = views.double() * std + mean
    assert pixels.min() > -1e-4
    assert pixels.max() < 1 + 1e-4
