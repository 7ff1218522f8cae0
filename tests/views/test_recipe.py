from __future__ import annotations

import pickle
from operator import itemgetter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.config.schema import CropConfig, ViewsConfig
from seed_exp.views import recipe
from seed_exp.views.draws import uniforms
from seed_exp.views.photometric import denormalize
from seed_exp.views.recipe import EvalViews, HostBatch, TrainViews

NUM = 12


def config(num_local: int = 3, num_global: int = 2) -> ViewsConfig:
    return ViewsConfig(
        name="test",
        crops={
            "global": CropConfig(24, num_global, [0.2, 1.0]),
            "local": CropConfig(16, num_local, [0.05, 0.3]),
        },
        jitter=[0.4, 0.4, 0.4, 0.1],
        jitter_prob=0.8,
        grayscale_prob=0.2,
        blur_prob=0.5,
        flip_prob=0.5,
        eval_size=20,
        eval_resize=24,
    )


def source() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(
            0, 256, (3, 30 + 3 * index, 60 - 2 * index), generator=generator, dtype=torch.uint8
        )
        for index in range(NUM)
    ]


def host(views: TrainViews | EvalViews, indices: list[int], epoch: int = 0) -> HostBatch:
    images = source()
    chosen = np.array(indices, dtype=np.int64)
    return made(views, [images[index] for index in indices], chosen * 10, epoch, chosen)


def made(
    views: TrainViews | EvalViews,
    images: list[Tensor],
    labels: NDArray[np.int64],
    epoch: int,
    indices: NDArray[np.int64],
) -> HostBatch:
    out = views.empty(len(images))
    views.host(images, labels, epoch, indices, out)
    return out


def test_views_have_the_documented_shapes_and_kinds() -> None:
    views = TrainViews(config(), seed=0)
    batch = host(views, [3, 1, 4, 5])
    assert {name: tuple(value.shape) for name, value in batch.views.items()} == {
        "global": (4, 2, 3, 24, 24),
        "local": (4, 3, 3, 16, 16),
    }
    assert all(
        value.dtype == torch.uint8 and value.movedim(2, -1).is_contiguous()
        for value in batch.views.values()
    )
    assert {name: tuple(value.shape[:2]) for name, value in batch.draws.items()} == {
        "global": (4, 2),
        "local": (4, 3),
    }
    assert batch.labels.tolist() == [30, 10, 40, 50]
    assert batch.indices.tolist() == [3, 1, 4, 5]
    out = views.device(batch)
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "global": (2, 4, 3, 24, 24),
        "local": (3, 4, 3, 16, 16),
    }
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in out.values())


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("num", [0, 1, 2])
def test_the_host_half_fills_its_rows_and_no_others(kind: str, num: int) -> None:
    views = TrainViews(config(), seed=0) if kind == "train" else EvalViews(config())
    room = views.empty(5).map(lambda tensor: tensor.fill_(77))
    indices = np.arange(num)
    views.host(source()[:num], indices * 10, 0, indices, room.map(itemgetter(slice(1, 1 + num))))
    expected = host(views, [0, 1])
    for found, wanted in zip(tensors(room), tensors(expected), strict=True):
        assert torch.equal(found[1 : 1 + num], wanted[:num])
        assert (found[:1] == 77).all()
        assert (found[1 + num :] == 77).all()


def tensors(batch: HostBatch) -> list[Tensor]:
    return [*batch.views.values(), *batch.draws.values(), batch.labels, batch.indices]


@settings(deadline=None, max_examples=10)
@given(
    indices=st.lists(st.integers(0, NUM - 1), min_size=1, max_size=NUM), epoch=st.integers(0, 1000)
)
def test_pixels_do_not_depend_on_the_batch_an_image_comes_in(
    indices: list[int], epoch: int
) -> None:
    views = TrainViews(config(), seed=1)
    batch = host(views, indices, epoch)
    together = views.device(batch)
    for place, index in enumerate(indices):
        alone = host(views, [index], epoch)
        for name, out in views.device(alone).items():
            assert torch.equal(alone.views[name][0], batch.views[name][place])
            assert torch.equal(alone.draws[name][0], batch.draws[name][place])
            torch.testing.assert_close(out[:, 0], together[name][:, place], atol=1e-5, rtol=0)


def test_views_of_a_larger_number_begin_with_those_of_a_smaller() -> None:
    few, many = (
        host(TrainViews(config(1, 1), seed=0), [0, 1]),
        host(TrainViews(config(4, 2), seed=0), [0, 1]),
    )
    for name in few.views:
        assert torch.equal(few.views[name][:, 0], many.views[name][:, 0])
        assert torch.equal(few.draws[name][:, 0], many.draws[name][:, 0])


def test_the_order_of_resolutions_in_the_config_changes_nothing() -> None:
    swapped = config()
    swapped.crops = dict(reversed(swapped.crops.items()))
    first, second = (
        host(TrainViews(config(), seed=0), [0, 1]),
        host(TrainViews(swapped, seed=0), [0, 1]),
    )
    assert all(torch.equal(first.views[name], second.views[name]) for name in ("global", "local"))


def test_no_local_views_means_no_such_resolution() -> None:
    batch = host(TrainViews(config(num_local=0), seed=0), [0, 1])
    assert list(batch.views) == list(batch.draws) == ["global"]


def test_epochs_seeds_views_and_samples_differ() -> None:
    indices = [0, 1]
    drawn = [
        value
        for seed in (0, 1)
        for epoch in (0, 1)
        for value in host(TrainViews(config(), seed), indices, epoch).draws.values()
    ]
    sigma_free = torch.cat([value.flatten(0, 1) for value in drawn])[:, :4]
    jittered = sigma_free[sigma_free[:, 3] != 0]
    assert len(jittered) > 20
    assert len(jittered.unique(dim=0)) == len(jittered)
    image = source()[0]
    same = made(TrainViews(config(), 0), [image, image], np.zeros(2, np.int64), 0, np.array([0, 1]))
    assert not torch.equal(same.views["global"][0], same.views["global"][1])
    assert not torch.equal(same.views["global"][0, 0], same.views["global"][0, 1])


def test_crops_and_colours_of_every_resolution_have_their_own_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = []

    def recorded(
        seed: int, epoch: int, indices: NDArray[np.int64], stream: int, num: int
    ) -> NDArray[np.float64]:
        streams.append(stream)
        return uniforms(seed, epoch, indices, stream, num)

    monkeypatch.setattr(recipe, "uniforms", recorded)
    host(TrainViews(config(), seed=0), [0, 1])
    assert len(set(streams)) == len(streams) == 4


def test_views_survive_pickling() -> None:
    for views in (TrainViews(config(), seed=3), EvalViews(config())):
        batch, again = host(views, [0, 5]), host(pickle.loads(pickle.dumps(views)), [0, 5])
        assert torch.equal(batch.views["global"], again.views["global"])


def test_images_of_one_pixel_become_views() -> None:
    image = torch.full((3, 1, 1), 100, dtype=torch.uint8)
    for views in (TrainViews(config(), seed=0), EvalViews(config())):
        batch = made(views, [image], np.array([-1]), 0, np.array([0]))
        assert all((value == 100).all() for value in batch.views.values())
        assert all(value.isfinite().all() for value in views.device(batch).values())


def test_evaluation_views_are_the_same_every_epoch_and_only_normalised() -> None:
    views = EvalViews(config())
    batch = host(views, [2, 7])
    assert batch.draws == {}
    assert batch.views["global"].shape == (2, 1, 3, 20, 20)
    assert torch.equal(batch.views["global"], host(views, [2, 7], epoch=5).views["global"])
    out = views.device(batch)["global"]
    assert out.shape == (1, 2, 3, 20, 20)
    assert torch.equal(denormalize(out, config())[0], batch.views["global"][:, 0])


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        host(TrainViews(config(), seed=-1), [0])
