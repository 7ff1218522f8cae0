"""Intersection over union against loops, and predictions for whole images against one window."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import reference
import torch
from textures import NUM_CLASSES, write_masks
from torch import Tensor
from torch.nn import functional as F

from seed_exp.config.schema import CropConfig, Precision, ViewsConfig
from seed_exp.data.images_and_masks import ImagesAndMasks
from seed_exp.data.mask_sets import load_mask_folder
from seed_exp.evaluation import segmentation
from seed_exp.evaluation.segmentation import (
    agreement,
    confusion,
    segment_images,
    survey,
    windows,
)

CPU = torch.device("cpu")
VIEWS = ViewsConfig("eval", {"global": CropConfig()}, mean=[0.5] * 3, std=[0.25] * 3)


def test_the_measures_are_their_definitions_over_all_images() -> None:
    draws = torch.Generator().manual_seed(0)
    masks = [torch.randint(5, size, generator=draws) for size in ((7, 9), (4, 3), (6, 6))]
    guesses = [
        torch.where(torch.rand(mask.shape, generator=draws) < 0.6, mask, (mask + 1) % 5)
        for mask in masks
    ]
    for mask in masks:
        mask[torch.rand(mask.shape, generator=draws) < 0.2] = 255
    total = torch.zeros(8, 8, dtype=torch.int64)  # classes 5 to 7 are nowhere
    for guess, mask in zip(guesses, masks, strict=True):
        total += confusion(guess, mask.to(torch.uint8), 8)
    expected = reference.segmentation(
        [guess.tolist() for guess in guesses], [mask.tolist() for mask in masks], 8
    )
    assert agreement(total) == pytest.approx(expected)
    # A class that is predicted and nowhere true counts, with 0.
    one = confusion(torch.tensor([[0, 7]]), torch.tensor([[0, 0]], dtype=torch.uint8), 8)
    assert agreement(one)["miou"] == 25


@pytest.mark.parametrize(("height", "width", "size"), [(48, 48, 48), (49, 130, 48), (300, 16, 16)])
def test_windows_cover_every_pixel_and_nothing_beyond(height: int, width: int, size: int) -> None:
    covered = torch.zeros(height, width, dtype=torch.int64)
    places = list(windows(height, width, size))
    for top, left in places:
        assert 0 <= top <= height - size
        assert 0 <= left <= width - size
        covered[top : top + size, left : left + size] += 1
    assert covered.min() >= 1
    assert len(places) == len(set(places))
    if (height, width) == (size, size):
        assert places == [(0, 0)]


def by_colour(images: Tensor) -> Tensor:
    """Logits [n, C, S / 2, S / 2] that only depend on the pixels beside them."""
    grey = F.avg_pool2d(images.mean(1, keepdim=True), 2)
    return torch.cat([-((grey - number / 2) ** 2) for number in range(-1, NUM_CLASSES - 1)], 1)


def test_a_prediction_is_that_of_the_definition_whatever_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_masks(tmp_path, {"train": (5, 3)})
    whole = load_mask_folder(tmp_path / "images" / "train", tmp_path / "masks" / "train", tmp_path)
    source = ImagesAndMasks(whole)
    source.num_classes = NUM_CLASSES
    found = survey(source, 2, tolerant=False)
    assert found.pixels.sum() == sum(mask.numel() for mask in map(whole.mask, range(3)))

    def measured(networks: dict[str, segmentation.Logits]) -> dict[str, dict[str, float]]:
        return segment_images(
            networks, source, VIEWS, 32, found.elongation, CPU, 0, Precision.float32
        )

    guesses, masks = [], []
    for index in range(3):
        pixels, mask = whole.image(index), whole.mask(index)
        height, width = (side * 32 // min(mask.shape) for side in mask.shape)
        small = F.interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)
        total, number = torch.zeros(NUM_CLASSES, height, width), torch.zeros(height, width)
        for top in sorted({*range(0, height - 32, 21), height - 32}):
            for left in sorted({*range(0, width - 32, 21), width - 32}):
                window = (small[:, :, top : top + 32, left : left + 32] / 255 - 0.5) / 0.25
                logits = F.interpolate(by_colour(window), (32, 32), mode="bilinear")[0]
                total[:, top : top + 32, left : left + 32] += logits
                number[top : top + 32, left : left + 32] += 1
        large = F.interpolate((total / number)[None], mask.shape, mode="bilinear")[0]
        guesses.append(large.argmax(0).tolist())
        masks.append(mask.tolist())
    expected = reference.segmentation(guesses, masks, NUM_CLASSES)
    assert measured({"a": by_colour})["a"] == pytest.approx(expected, abs=0.1)
    # One class and one window at a time.
    monkeypatch.setattr(segmentation, "_LARGEST", 1)
    monkeypatch.setattr(segmentation, "_BATCH_SIZE", 1)
    both = measured({"a": by_colour, "b": lambda images: by_colour(images) * math.nan})
    assert both["a"] == pytest.approx(expected, abs=0.1)
    assert all(math.isnan(value) for value in both["b"].values())
