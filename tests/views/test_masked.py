"""Crops of images and masks: the mask is cut, enlarged and flipped as its image is."""

from __future__ import annotations

import pickle

import numpy as np
import torch
from torch import Tensor

from seed_exp.config.schema import CropConfig, ViewsConfig
from seed_exp.views.masked import MaskedCrops, ShorterSide, resized
from seed_exp.views.recipe import HostBatch

CONFIG = ViewsConfig(
    "segment", {"global": CropConfig()}, flip_prob=0.5, mean=[0.4] * 3, std=[0.25] * 3
)
SIZE = 32


def image(number: int) -> Tensor:
    """Two regions of different brightness with their classes, 40 pixels and more a side."""
    draws = np.random.default_rng(number)
    height, width = (int(side) for side in draws.integers(40, 90, 2))
    classes = torch.zeros(height, width, dtype=torch.uint8)
    classes[:, int(draws.integers(10, width - 10)) :] = 1
    classes[int(draws.integers(10, height - 10)) :] += 2
    return torch.cat([(40 + 50 * classes).expand(3, -1, -1), classes[None]])


def batch(views: MaskedCrops, indices: list[int], epoch: int = 3) -> HostBatch:
    out = views.empty(len(indices))
    images = [image(index) for index in indices]
    views.host(images, np.full(len(indices), -1), epoch, np.array(indices), out)
    return out


def test_every_pixel_has_the_class_of_its_colour_or_is_beyond_the_image() -> None:
    views = pickle.loads(pickle.dumps(MaskedCrops(CONFIG, SIZE, [0.5, 2.0], seed=1)))
    made = views.device(batch(views, list(range(24))))
    crops, masks = made["global"][0], made["mask"][0][:, 0]
    assert (crops.shape, masks.shape) == ((24, 3, SIZE, SIZE), (24, SIZE, SIZE))
    shade = (crops[:, 0] * 0.25 + 0.4) * 255
    beyond = masks == 255
    assert 0 < beyond.float().mean() < 0.5  # grey is the mean of the normalisation
    assert (shade[beyond] - 102).abs().max() < 0.6
    inside = ~beyond

    def mismatched(classes: Tensor) -> float:
        wrong = (shade - (40 + 50 * classes.float())).abs() > 26  # half the step between two
        return float(wrong[inside].float().mean())

    # Resizing blends the pixels beside a border, so that their colour is between two.
    assert mismatched(masks) < 0.03
    assert mismatched(masks.roll(4, -1)) > 0.06
    assert mismatched(masks.roll(4, -2)) > 0.06
    assert len(masks[inside].unique()) == 4


def test_crops_depend_on_seed_epoch_and_image_alone_and_flips_mirror_both() -> None:
    views = MaskedCrops(CONFIG, SIZE, [0.5, 2.0], seed=1)
    many, alone = batch(views, [3, 7, 9]), batch(views, [7])
    for name in ("global", "mask"):
        assert torch.equal(many.views[name][1], alone.views[name][0])
    assert not torch.equal(batch(views, [7], epoch=4).views["mask"], alone.views["mask"])
    flips = {}
    for prob in (0.0, 1.0):
        config = ViewsConfig("s", {"global": CropConfig()}, flip_prob=prob)
        views = MaskedCrops(config, SIZE, [0.5, 2.0], seed=1)
        flips[prob] = views.device(batch(views, [7]))
    for name in ("global", "mask"):
        assert torch.equal(flips[1.0][name], flips[0.0][name].flip(-1))


def test_a_scale_of_one_shows_the_shorter_side_as_it_is() -> None:
    square = torch.arange(SIZE * SIZE).view(1, SIZE, SIZE).expand(4, -1, -1).to(torch.uint8)
    views = MaskedCrops(CONFIG, SIZE, [1.0, 1.0], seed=0)
    out = views.empty(1)
    views.host([square], np.array([-1]), 0, np.array([0]), out)
    assert torch.equal(out.views["global"][0, 0], square[:3])
    assert torch.equal(out.views["mask"][0, 0], square[3:])


def test_a_whole_image_fills_the_corner_of_a_square() -> None:
    views = ShorterSide(CONFIG, 20, 64)
    sizes = [(40, 100), (7, 7), (30, 20)]
    out = views.empty(3)
    images = [torch.full((3, *size), 200, dtype=torch.uint8) for size in sizes]
    views.host(images, np.full(3, -1), 0, np.arange(3), out)
    for size, shown in zip(sizes, out.views["global"][:, 0], strict=True):
        height, width = resized(*size, 20)
        assert min(height, width) == 20
        assert abs(height / width - size[0] / size[1]) < 0.06
        assert (shown[:, :height, :width] == 200).all()
