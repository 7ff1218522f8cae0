"""Mixup: what is mixed with what, in which proportion, and that nothing else decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from torch import Tensor

from seed_exp.config.compose import compose
from seed_exp.config.schema import EVALUATIONS
from seed_exp.data.order import SampleOrder
from seed_exp.data.subsets import evenly_spaced
from seed_exp.reporting import image_grids
from seed_exp.training.distillation import refuse_missing_views
from seed_exp.views.draws import uniforms
from seed_exp.views.recipe import HostBatch, TrainViews

SEED, NUM = 5, 40
PLAIN, MIXED = (TrainViews(tiny.views_config(mixup=mixup), SEED) for mixup in (False, True))


def host(views: TrainViews, indices: list[int], epoch: int = 3) -> HostBatch:
    images, rows = tiny.Images(NUM), np.array(indices)
    batch = views.empty(len(indices))
    views.host([images.image(index) for index in indices], rows, epoch, rows, batch)
    return batch._replace(epoch=epoch)


def views_of(views: TrainViews, indices: list[int], epoch: int = 3) -> dict[str, Tensor]:
    return views.device(host(views, indices, epoch))


def test_each_view_is_mixed_with_that_of_its_neighbour_in_its_own_proportion() -> None:
    indices = [7, 0, 3, 39, 21, 2]
    plain, mixed = views_of(PLAIN, indices), views_of(MIXED, indices)
    assert mixed.keys() == {"global", "local"}
    for number, name in enumerate(sorted(mixed)):
        for view in range(len(mixed[name])):
            for place, index in enumerate(indices):
                share = uniforms(SEED, 3, np.array([index]), (1 << 14) + number, view + 1)[0, -1]
                own, other = plain[name][view, place], plain[name][view, place ^ 1]
                share32 = torch.tensor(share, dtype=torch.float32)
                assert torch.equal(mixed[name][view, place], share32 * own + (1 - share32) * other)


def test_shares_are_uniform_and_differ_between_views_images_epochs_and_resolutions() -> None:
    batches = [host(MIXED, list(range(NUM)), epoch).draws for epoch in range(30)]
    shares = torch.cat([draws[name][..., -1].flatten() for draws in batches for name in draws])
    assert len(shares.unique()) > 0.999 * len(shares) == 0.999 * 30 * NUM * 5
    for level in (0.1, 0.5, 0.9):
        assert (shares < level).float().mean().item() == pytest.approx(level, abs=0.02)


def test_a_pair_is_mixed_alike_wherever_it_is_in_a_batch_bit_for_bit() -> None:
    whole = views_of(MIXED, [7, 0, 3, 39, 21, 2, 11, 12])
    for place, pair in ((0, [7, 0]), (4, [21, 2]), (6, [11, 12])):
        alone = views_of(MIXED, pair)
        for name, views in alone.items():
            assert torch.equal(views, whole[name][:, place : place + 2])
    swapped = views_of(MIXED, [0, 7])
    assert torch.equal(swapped["global"], whole["global"][:, [1, 0]])


def test_the_last_of_an_odd_number_of_images_is_not_mixed() -> None:
    indices = [7, 0, 3]
    plain, mixed = views_of(PLAIN, indices), views_of(MIXED, indices)
    assert torch.equal(mixed["local"][:, 2], plain["local"][:, 2])
    assert torch.equal(mixed["local"][:, :2], views_of(MIXED, [7, 0])["local"])


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 30),
    st.integers(0, 20),
)
def test_every_even_part_has_the_pairs_of_the_epochs_order(
    pairs: int, accumulation: int, world: int, more: int, step: int
) -> None:
    batch_size = 2 * pairs * accumulation * world
    num = batch_size + more
    seen = []
    for rank in range(world):
        order = SampleOrder(num, batch_size, SEED, rank, world)
        epoch, images = order.batch(step)
        for part in np.split(images, accumulation):
            assert np.array_equal(order.neighbours(epoch, part), part.reshape(-1, 2)[:, ::-1].flat)
            seen += part.tolist()
    # Nor do they depend on batches and processes.
    alone = SampleOrder(num, 1, SEED).neighbours(epoch, np.array(seen))
    assert np.array_equal(alone, np.array(seen).reshape(-1, 2)[:, ::-1].flat)


def test_every_image_but_the_last_of_an_odd_number_has_one_neighbour_anew_in_each_epoch() -> None:
    order = SampleOrder(41, 8, SEED)
    images = np.arange(41)
    first = order.neighbours(0, images)
    assert np.array_equal(order.neighbours(0, first), images)
    assert (first == images).sum() == 1
    assert (first != order.neighbours(1, images)).mean() > 0.8


def test_a_gallery_shows_what_training_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, Any] = {}
    monkeypatch.setattr(
        image_grids, "view_gallery", lambda images, views, _: shown.update(images=images, **views)
    )
    images: Any = tiny.Images(NUM)
    image_grids.recipe_gallery(images, MIXED, tmp_path / "views.png", num_images=4, epoch=3)
    order = SampleOrder(NUM, NUM, SEED)
    _, in_order = order.batch(3)
    expected = views_of(MIXED, in_order.tolist())
    indices = evenly_spaced(NUM, 4).tolist()
    places = [in_order.tolist().index(index) for index in indices]
    assert all(
        torch.equal(one, images.image(index))
        for one, index in zip(shown["images"], indices, strict=True)
    )
    for name in ("global", "local"):
        pixels = image_grids.denormalize(expected[name][:, places], MIXED.config)
        assert torch.equal(shown[name], pixels)


# --- in a training --------------------------------------------------------------------------------


def trained(folder: str, changes: dict[str, Any], num_workers: int = 0) -> dict[str, Any] | str:
    method = tiny.seed(["a"], bn=False)
    try:
        config = tiny.fit_config(**changes)
        tiny.train(method, Path(folder), config, num_workers=num_workers, mixup=True)
    except ValueError as error:
        return str(error)
    return {"networks": tiny.weights(method), "queues": method.carried.state_dict()}


def test_the_number_of_workers_and_parts_changes_nothing(tmp_path: Path) -> None:
    one = trained(str(tmp_path / "one"), {})
    tiny.assert_same(one, trained(str(tmp_path / "two"), {}, num_workers=2))
    parts = trained(str(tmp_path / "parts"), {"accumulation": 4})
    for value, other in zip(tiny.flat(one).values(), tiny.flat(parts).values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(other), torch.as_tensor(value))


@pytest.mark.parametrize(
    ("changes", "images", "split"),
    [
        ({"batch_size": 7}, 7, "1 processes x accumulation=1"),
        ({"batch_size": 8, "accumulation": 8}, 1, "1 processes x accumulation=8"),
    ],
)
def test_parts_that_would_part_a_pair_are_refused(
    changes: dict[str, int], images: int, split: str, tmp_path: Path
) -> None:
    message = trained(str(tmp_path), changes)
    assert f"leaves {images} images to each of {split} parts" in message


def test_processes_that_would_part_a_pair_are_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    for message in two_ranks.run(trained, str(tmp_path), {"batch_size": 6}):
        assert "leaves 3 images to each of 2 processes x accumulation=1 parts" in message


def test_batch_size_auto_finds_an_even_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seed_exp.engine.memory.SMALLEST_BATCH", 1)
    monkeypatch.setattr("seed_exp.engine.fleet.largest_batch_size", smallest)
    trained(str(tmp_path), {"batch_size": "auto", "steps": None, "epochs": 1, "accumulation": 3})
    assert tiny.last_checkpoint(tmp_path)["batch_size"] == 6


def smallest(step: Any, *, limit: int, multiple_of: int, device: torch.device) -> int:
    step(multiple_of)
    return multiple_of


# --- where it does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["disco", "bingo_bags", "seed_strong"])
def test_objectives_that_compare_two_views_of_an_image_are_refused(objective: str) -> None:
    words = ["data=digits", f"objective={objective}", "views.mixup=true"]
    config = compose("distill", [*words, "views.crops.global.num=2"])
    with pytest.raises(ValueError, match=f"objective={objective} does not take views.mixup=true"):
        refuse_missing_views(config)


def test_objectives_that_compare_a_view_with_itself_are_taken() -> None:
    refuse_missing_views(compose("distill", ["data=digits", "views.mixup=true"]))


@pytest.mark.parametrize(
    "command",
    ["pretrain", *(f"{name} run=." for name, kind in EVALUATIONS.items() if kind.trains)],
)
def test_commands_that_need_whole_images_refuse_it(command: str) -> None:
    name, *words = command.split()
    sources = EVALUATIONS[name].sources if name in EVALUATIONS else None
    data = [f"data={sources[0]}", "data.root=."] if sources else ["data=digits"]
    with pytest.raises(ValueError, match=rf"{name} does not take views\.mixup=true"):
        compose(name, [*words, *data, "views.mixup=true"])


def test_the_host_half_of_views_without_mixup_is_what_it_was() -> None:
    plain, mixed = host(PLAIN, [4, 5]), host(MIXED, [4, 5])
    without = {name: draws[..., :-1] for name, draws in mixed.draws.items()}
    tiny.assert_same(plain.draws, without)
    tiny.assert_same(plain.views, mixed.views)
