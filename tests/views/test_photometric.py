from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor
from torchvision.transforms import functional as tv

from seed_exp.config.schema import CropConfig, ViewsConfig
from seed_exp.views import photometric as room
from seed_exp.views.photometric import (
    NUM_PHOTOMETRIC_DRAWS,
    Column,
    adjust_hue,
    blend_step,
    color_jitter,
    denormalize,
    draw_parameters,
    gaussian_blur,
    grayscale,
    normalize,
    photometric,
)

STEPS = {
    Column.BRIGHTNESS: tv.adjust_brightness,
    Column.CONTRAST: tv.adjust_contrast,
    Column.SATURATION: tv.adjust_saturation,
}
# torchvision's luminance weights are 0.2989, 0.587, 0.114: up to 1e-4 of the value below Pillow's
# and ours, per step.
TOLERANCE = 5e-4


def recipe(**options: object) -> ViewsConfig:
    full = {
        "jitter": [0.8, 0.8, 0.8, 0.4],
        "jitter_prob": 0.8,
        "grayscale_prob": 0.3,
        "blur_prob": 0.5,
        "flip_prob": 0.5,
    }
    return ViewsConfig(name="test", crops={"global": CropConfig()}, **{**full, **options})  # type: ignore[arg-type]


def pictures(num: int, size: int = 20) -> Tensor:
    """uint8 [num, 3, size, size]: noise over gradients, with grey, black, white, pure colours."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 3, size, size), generator=generator, dtype=torch.uint8)
    images[:, :, 0] = images[:, :1, 0]
    for column, color in enumerate(itertools.product((0, 255), repeat=3)):
        images[:, :, 1, column] = torch.tensor(color, dtype=torch.uint8)
    return images


def parameters(num: int, config: ViewsConfig, seed: int = 0) -> Tensor:
    return draw_parameters(np.random.default_rng(seed).random((num, NUM_PHOTOMETRIC_DRAWS)), config)


def order(row: Tensor) -> list[Column]:
    """The four steps of the jitter in the order of one row of parameters."""
    steps = [Column(int(row[column])) for column in (Column.FIRST, Column.SECOND, Column.THIRD)]
    steps.insert(int(row[Column.BEFORE_HUE]), Column.HUE)
    return steps


def dense_blur(image: Tensor, sigma: float, radius: int) -> Tensor:
    """Sum over all offsets in two dimensions, pixel coordinates clamped to the image."""
    if sigma == 0:
        return image
    size = image.shape[-1]
    out, total = torch.zeros_like(image, dtype=torch.float64), 0.0
    for dy, dx in itertools.product(range(-radius, radius + 1), repeat=2):
        weight = math.exp(-(dy * dy + dx * dx) / (2 * sigma * sigma))
        rows, columns = (
            (torch.arange(size) + dy).clamp(0, size - 1),
            (torch.arange(size) + dx).clamp(0, size - 1),
        )
        out += weight * image[:, rows][:, :, columns]
        total += weight
    return (out / total).float()


def one_by_one(images: Tensor, rows: Tensor, config: ViewsConfig) -> Tensor:
    """The recipe with torchvision's operations, one image at a time."""
    out = []
    for picture, row in zip(images, rows, strict=True):
        image = picture.float() / 255
        gray = bool(row[Column.GRAYSCALE])
        if gray and config.grayscale_first:
            image = tv.rgb_to_grayscale(image, 3)
        for step in order(row):
            amount = float(row[step])
            image = (
                tv.adjust_hue(image, amount) if step == Column.HUE else STEPS[step](image, amount)
            )
        if gray and not config.grayscale_first:
            image = tv.rgb_to_grayscale(image, 3)
        image = dense_blur(image, float(row[Column.SIGMA]), math.ceil(3 * config.blur_sigma[1]))
        if row[Column.FLIP]:
            image = tv.hflip(image)
        out.append(tv.normalize(image, config.mean, config.std))
    return torch.stack(out)


@pytest.mark.parametrize("grayscale_first", [False, True])
def test_a_mixed_batch_equals_torchvision_image_by_image(grayscale_first: bool) -> None:
    config = recipe(grayscale_first=grayscale_first)
    images, rows = pictures(60), parameters(60, config)
    expected = one_by_one(images, rows, config)
    torch.testing.assert_close(
        photometric(images, rows, config), expected, atol=4 * TOLERANCE / 0.22, rtol=0
    )


def test_the_order_of_the_jitter_matters_and_all_24_are_followed() -> None:
    images = pictures(1).expand(24, -1, -1, -1).float() / 255
    rows = torch.zeros(24, len(Column))
    rows[:, : Column.HUE + 1] = torch.tensor([1.5, 0.4, 1.7, 0.2])
    for row, (blends, before_hue) in zip(
        rows, itertools.product(itertools.permutations(range(3)), range(4)), strict=True
    ):
        row[Column.FIRST : Column.BEFORE_HUE + 1] = torch.tensor([*blends, before_hue])
    assert len({tuple(order(row)) for row in rows}) == 24
    out = color_jitter(images.clone(), rows)
    neutral = recipe(mean=[0.0] * 3, std=[1.0] * 3)
    torch.testing.assert_close(
        out,
        one_by_one(pictures(1).expand(24, -1, -1, -1), rows, neutral),
        atol=TOLERANCE * 4,
        rtol=0,
    )
    distances = torch.cdist(out.flatten(1), out.flatten(1)) + torch.eye(24)
    assert distances.min() > 0.01


@pytest.mark.parametrize("step", list(STEPS))
def test_blend_steps_equal_torchvision(step: Column) -> None:
    images = pictures(5).float() / 255
    factors = torch.tensor([0.0, 0.3, 1.0, 1.2, 1.9])
    out = blend_step(images, torch.full((5,), int(step)), factors)
    expected = torch.stack(
        [STEPS[step](image, float(factor)) for image, factor in zip(images, factors, strict=True)]
    )
    torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(out[2], images[2], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("step", "enhance"),
    [
        (Column.BRIGHTNESS, ImageEnhance.Brightness),
        (Column.CONTRAST, ImageEnhance.Contrast),
        (Column.SATURATION, ImageEnhance.Color),
    ],
)
def test_blend_steps_equal_pillow_within_its_rounding(
    step: Column, enhance: Callable[[Image.Image], ImageEnhance._Enhance]
) -> None:
    images = pictures(4)
    factors = torch.tensor([0.3, 0.9, 1.2, 1.7])
    out = blend_step(images.float() / 255, torch.full((4,), int(step)), factors) * 255
    for image, factor, ours in zip(images, factors, out, strict=True):
        theirs = enhance(Image.fromarray(image.permute(1, 2, 0).numpy())).enhance(float(factor))
        difference = (ours - torch.from_numpy(np.array(theirs)).permute(2, 0, 1)).abs()
        assert (
            difference.max() <= 1.5
        )  # Pillow rounds the luminance (times 1 - factor), then cuts off the result's fraction
        assert difference.mean() < 0.7


def test_hue_equals_torchvision() -> None:
    images = pictures(6).float() / 255
    shifts = torch.tensor([-0.5, -0.4, -0.013, 0.0, 0.25, 0.5])
    expected = torch.stack(
        [tv.adjust_hue(image, float(shift)) for image, shift in zip(images, shifts, strict=True)]
    )
    torch.testing.assert_close(adjust_hue(images, shifts), expected, atol=2e-6, rtol=0)


def test_grayscale_equals_pillow_and_torchvision() -> None:
    images = pictures(3)
    out = grayscale(images.float() / 255)
    torch.testing.assert_close(
        out, tv.rgb_to_grayscale(images.float() / 255, 3), atol=TOLERANCE, rtol=0
    )
    for image, ours in zip(images, out, strict=True):
        theirs = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))
        assert np.abs(ours.numpy() * 255 - theirs).max() <= 0.51
    assert out.is_contiguous()  # later steps write into it


@pytest.mark.parametrize("size", [3, 20])
def test_blur_equals_the_dense_sum_also_where_the_kernel_is_larger_than_the_image(
    size: int,
) -> None:
    images = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([0.0, 0.1, 0.6, 1.3, 2.0])
    expected = torch.stack(
        [dense_blur(image, float(sigma), 6) for image, sigma in zip(images, sigmas, strict=True)]
    )
    torch.testing.assert_close(gaussian_blur(images, sigmas, 6), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_of_photographs_is_within_a_grey_level_of_pillows_on_average(
    photographs: list[Image.Image], sigma: float
) -> None:
    # Pillow approximates the Gaussian by three box filters and rounds to whole grey levels.
    for photograph in photographs:
        picture = photograph.resize((224, 224))
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
        ours = gaussian_blur(image[None] / 255, torch.tensor([sigma]), 6)[0] * 255
        pillows = np.array(picture.filter(ImageFilter.GaussianBlur(sigma))).astype(np.float32)
        assert (ours - torch.from_numpy(pillows).permute(2, 0, 1)).abs().mean() < 1


def test_blur_is_float32_under_autocast() -> None:
    images, sigmas = torch.rand(2, 3, 16, 16), torch.tensor([0.5, 2.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gaussian_blur(images, sigmas, 6)
    torch.testing.assert_close(out, gaussian_blur(images, sigmas, 6), atol=0, rtol=0)


def test_selecting_after_the_fact_as_on_a_gpu_gives_the_same_views(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = recipe()
    images, rows = pictures(40), parameters(40, config)
    expected = photometric(images, rows, config)
    monkeypatch.setattr(room, "_apply_to_rows", room._apply_and_select)
    torch.testing.assert_close(photometric(images, rows, config), expected, atol=1e-5, rtol=0)


def test_selecting_after_the_fact_compiles_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_apply_to_rows", room._apply_and_select)  # as on a GPU
    config = recipe()
    images, rows = pictures(6), parameters(6, config)
    compiled = torch.compile(photometric, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, rows, config), photometric(images, rows, config))


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_views_without_waiting() -> None:
    config = recipe()
    images, rows = pictures(40, size=96), parameters(40, config)
    expected = photometric(images, rows, config)
    images, rows = images.cuda(), rows.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = photometric(images, rows, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), expected, atol=1e-4, rtol=0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe()
    images, rows = pictures(17), parameters(17, config)
    expected = photometric(images, rows, config)
    monkeypatch.setattr(room, "_CHUNK_VALUES", 1)
    torch.testing.assert_close(photometric(images, rows, config), expected, atol=1e-5, rtol=0)


def test_a_recipe_without_operations_only_normalises_and_its_input_stays() -> None:
    config = ViewsConfig(name="none", crops={"global": CropConfig()})
    images = pictures(3)
    out = photometric(images, parameters(3, config), config)
    torch.testing.assert_close(out, tv.normalize(images.float() / 255, config.mean, config.std))
    full = recipe()
    before = images.clone()
    photometric(images, parameters(3, full), full)
    assert torch.equal(images, before)


def test_parameters_have_the_recipes_distribution() -> None:
    config = recipe(jitter=[0.4, 1.5, 0.2, 0.1], blur_sigma=[0.1, 2.0])
    num = 40_000
    rows = parameters(num, config).double()
    assert rows.shape == (num, len(Column))

    def close(values: Tensor, expected: float) -> bool:
        return (
            abs(float(values.double().mean()) - expected)
            < 5 * float(values.double().std()) / len(values) ** 0.5
        )

    jittered = (rows[:, Column.BRIGHTNESS] != 1) | (rows[:, Column.HUE] != 0)
    assert close(jittered, 0.8)
    assert close(rows[:, Column.GRAYSCALE], 0.3)
    assert close(rows[:, Column.FLIP], 0.5)
    assert close(rows[:, Column.SIGMA] > 0, 0.5)
    drawn = {
        Column.BRIGHTNESS: (rows[jittered, Column.BRIGHTNESS], 0.6, 1.4),
        Column.CONTRAST: (rows[jittered, Column.CONTRAST], 0.0, 2.5),
        Column.SATURATION: (rows[jittered, Column.SATURATION], 0.8, 1.2),
        Column.HUE: (rows[jittered, Column.HUE], -0.1, 0.1),
        Column.SIGMA: (rows[rows[:, Column.SIGMA] > 0, Column.SIGMA], 0.1, 2.0),
    }
    for values, low, high in drawn.values():
        assert low - 1e-6 <= float(values.min()) < low + 1e-3 * (high - low)
        assert high - 1e-3 * (high - low) < float(values.max()) <= high + 1e-6
        assert close(values, (low + high) / 2)
        assert close(((values - low) / (high - low)).square(), 1 / 3)
    assert torch.equal(
        rows[~jittered][:, :4],
        torch.tensor([1.0, 1, 1, 0]).double().expand(int((~jittered).sum()), 4),
    )
    counts = {
        tuple(steps): 0
        for steps in itertools.permutations(
            (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION, Column.HUE)
        )
    }
    for row in rows[:12_000]:
        counts[tuple(order(row))] += 1
    assert len(counts) == 24
    assert all(abs(count - 500) < 5 * 500**0.5 for count in counts.values())
    correlations = torch.corrcoef(
        rows[jittered][:, [0, 1, 2, 3, Column.GRAYSCALE, Column.FLIP]].T
    ) - torch.eye(6)
    assert correlations.abs().max() < 5 / (0.8 * num) ** 0.5


@pytest.mark.parametrize(("probability", "applied"), [(0.0, 0), (1.0, 500)])
def test_probabilities_0_and_1_mean_never_and_always(probability: float, applied: int) -> None:
    config = recipe(
        jitter_prob=probability,
        grayscale_prob=probability,
        blur_prob=probability,
        flip_prob=probability,
    )
    rows = parameters(500, config)
    assert int((rows[:, Column.HUE] != 0).sum()) == applied
    for column in (Column.GRAYSCALE, Column.SIGMA, Column.FLIP):
        assert int((rows[:, column] > 0).sum()) == applied


def test_denormalize_inverts_normalize() -> None:
    config = recipe()
    images = pictures(4)
    assert torch.equal(denormalize(normalize(images.float() / 255, config), config), images)
