from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms

from seed_exp.views.crops import (
    NUM_CROP_DRAWS,
    crop_resize,
    random_resized_crop_boxes,
    resize_center_crop,
)

RATIO = (3 / 4, 4 / 3)


def reference_box(
    height: int, width: int, draws: list[float], scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws one box, attempt after attempt, as torchvision's documentation describes it."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        ratio = math.exp(
            math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * draws[10 + attempt]
        )
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    if width / height < RATIO[0]:
        w, h = width, round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w, h = round(height * RATIO[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def generated(num: int) -> list[Image.Image]:
    """Noise over gradients: every frequency, several sizes."""
    generator = np.random.default_rng(0)
    pictures = []
    for number in range(num):
        height, width = 40 + 60 * number, 300 - 25 * number
        gradient = np.linspace(0, 155, width)[None, :, None] * np.ones((height, 1, 3))
        pictures.append(
            Image.fromarray(
                (gradient + generator.uniform(0, 100, (height, width, 3))).astype(np.uint8)
            )
        )
    return pictures


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def assert_crops_equal_pillows(pictures: list[Image.Image]) -> None:
    generator = np.random.default_rng(1)
    for size, scale in ((224, (0.2, 1.0)), (96, (0.05, 0.14))):
        draws = generator.random((len(pictures), NUM_CROP_DRAWS))
        heights, widths = (
            np.array([picture.height for picture in pictures]),
            np.array([picture.width for picture in pictures]),
        )
        for picture, box in zip(
            pictures, random_resized_crop_boxes(heights, widths, draws, scale, RATIO), strict=True
        ):
            top, left, height, width = box.tolist()
            expected = picture.crop((left, top, left + width, top + height)).resize(
                (size, size), Image.Resampling.BILINEAR
            )
            for image in (tensor(picture), tensor(picture).contiguous()):
                out = torch.empty(3, size, size, dtype=torch.uint8)
                crop_resize(image, box.tolist(), out)
                difference = (out.float() - tensor(expected).float()).abs()
                assert difference.mean() < 0.3
                assert difference.max() <= 1


def assert_centre_crops_equal_torchvisions(pictures: list[Image.Image]) -> None:
    for resize, size in ((256, 224), (32, 32), (65, 40)):
        transform = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])
        for picture in pictures:
            out = torch.empty(3, size, size, dtype=torch.uint8)
            resize_center_crop(tensor(picture), resize, out)
            difference = (out.float() - tensor(transform(picture)).float()).abs()
            assert difference.mean() < 0.3
            assert difference.max() <= 1


def test_crops_of_photographs_equal_pillows(photographs: list[Image.Image]) -> None:
    assert_crops_equal_pillows(photographs)


def test_crops_of_generated_images_equal_pillows() -> None:
    assert_crops_equal_pillows(generated(8))


def test_centre_crops_of_photographs_equal_torchvisions(photographs: list[Image.Image]) -> None:
    assert_centre_crops_equal_torchvisions(photographs[:6])


def test_centre_crops_of_generated_images_equal_torchvisions() -> None:
    assert_centre_crops_equal_torchvisions(generated(8))


@given(
    heights=st.lists(st.integers(1, 3000), min_size=3, max_size=3),
    widths=st.lists(st.integers(1, 3000), min_size=3, max_size=3),
    scale=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted),
    seed=st.integers(0, 1000),
)
def test_boxes_lie_inside_any_image(
    heights: list[int], widths: list[int], scale: list[float], ratio: list[float], seed: int
) -> None:
    draws = np.random.default_rng(seed).random((3, NUM_CROP_DRAWS))
    draws[0], draws[1] = 0.0, 1 - 2.0**-32
    boxes = random_resized_crop_boxes(np.array(heights), np.array(widths), draws, scale, ratio)
    top, left, height, width = boxes.T
    assert (np.minimum(height, width) >= 1).all()
    assert (np.minimum(top, left) >= 0).all()
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()


@given(
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    scale=st.sampled_from([(0.05, 0.14), (0.2, 1.0), (0.9, 1.0)]),
)
def test_boxes_equal_the_loop_over_attempts(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    draws = np.random.default_rng(height * 1000 + width).random((5, NUM_CROP_DRAWS))
    boxes = random_resized_crop_boxes(np.array(height), np.array(width), draws, scale, RATIO)
    assert boxes.tolist() == [
        list(reference_box(height, width, row.tolist(), scale)) for row in draws
    ]


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (375, 500, (0.2, 1.0)),
        (375, 500, (0.05, 0.14)),
        (90, 160, (0.6, 1.0)),
        (20, 900, (0.2, 1.0)),
    ],
)
def test_boxes_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    num = 3000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(image, list(scale), list(RATIO))
            for _ in range(num)
        ],
        dtype=float,
    )
    draws = np.random.default_rng(0).random((num, NUM_CROP_DRAWS))
    ours = random_resized_crop_boxes(np.array(height), np.array(width), draws, scale, RATIO).astype(
        float
    )
    for mine, other in zip(ours.T, theirs.T, strict=True):
        values = np.sort(np.concatenate((mine, other)))
        steps = [
            np.searchsorted(np.sort(sample), values, side="right") / num for sample in (mine, other)
        ]
        assert (
            np.abs(steps[0] - steps[1]).max() < 1.95 * (2 / num) ** 0.5
        )  # Kolmogorov-Smirnov at 0.1 %


def test_images_of_one_pixel_work() -> None:
    image = torch.tensor([7, 8, 9], dtype=torch.uint8).view(3, 1, 1)
    draws = np.random.default_rng(0).random((1, NUM_CROP_DRAWS))
    (box,) = random_resized_crop_boxes(np.array([1]), np.array([1]), draws, (0.2, 1.0), RATIO)
    out = torch.empty(3, 5, 5, dtype=torch.uint8)
    crop_resize(image, box.tolist(), out)
    assert (out == image).all()
    out.zero_()
    resize_center_crop(image, 6, out)
    assert (out == image).all()
