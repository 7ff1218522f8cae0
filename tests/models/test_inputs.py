"""Views become what a teacher was trained to see; what it was is left alone, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from seed_exp.models.inputs import IMAGENET, Inputs, InputSpec

OTHER = InputSpec([0.5, 0.4, 0.3], [0.5, 0.25, 0.2])


def pixels(size: int = 20, num: int = 2) -> Tensor:
    """Random pixels [num, 3, size, size] in [0, 1]."""
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0))


def normalised(images: Tensor, spec: InputSpec) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (images - mean) / std


def test_what_fits_already_passes_as_it_is() -> None:
    views = normalised(pixels(), IMAGENET)
    for inputs in (
        Inputs(IMAGENET),
        Inputs(InputSpec(IMAGENET.mean, IMAGENET.std, multiple_of=10)),
        Inputs(OTHER),
    ):
        assert inputs(views) is views
    inputs = Inputs(IMAGENET)
    inputs.normalised_with(OTHER.mean, OTHER.std)
    inputs.normalised_with(IMAGENET.mean, IMAGENET.std)
    assert inputs(views) is views


def test_views_are_normalised_as_the_network_expects() -> None:
    inputs = Inputs(OTHER)
    inputs.normalised_with(IMAGENET.mean, IMAGENET.std)
    torch.testing.assert_close(
        inputs(normalised(pixels(), IMAGENET)), normalised(pixels(), OTHER), atol=1e-5, rtol=0
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = inputs(normalised(pixels(), IMAGENET))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, normalised(pixels(), OTHER), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("spec", "size", "expected"),
    [
        (InputSpec([], [], multiple_of=14), 224, 224),
        (InputSpec([], [], multiple_of=14), 96, 98),
        (InputSpec([], [], multiple_of=16), 96, 96),
        (InputSpec([], [], multiple_of=16), 97, 112),
        (InputSpec([], [], multiple_of=14), 8, 14),
        (InputSpec([], [], size=224), 96, 224),
        (InputSpec([], [], size=224), 256, 224),
        (InputSpec([], []), 97, 97),
    ],
)
def test_sizes_are_rounded_up_to_what_the_patches_divide(
    spec: InputSpec, size: int, expected: int
) -> None:
    inputs = Inputs(spec)
    assert inputs.size(size) == expected
    assert inputs(torch.zeros(1, 3, size, size)).shape[-2:] == (expected, expected)


@pytest.mark.parametrize(
    ("multiple", "sizes", "expected"),
    [
        (1, [32, 16, 20], [128, 64, 80]),
        (14, [32, 16, 20], [140, 70, 98]),
        (32, [2], [32]),
    ],
)
def test_views_are_resized_in_proportion(
    multiple: int, sizes: list[int], expected: list[int]
) -> None:
    inputs = Inputs(InputSpec([], [], multiple_of=multiple, interpolation="bilinear"))
    inputs.resized_by(140 if multiple == 14 else 128, 32)
    assert [inputs.size(size) for size in sizes] == expected
    view = pixels(sizes[0], 1)
    torch.testing.assert_close(
        inputs(view),
        F.interpolate(view, size=2 * [expected[0]], mode="bilinear", antialias=True),
    )


@pytest.mark.parametrize(
    ("name", "filter_"),
    [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)],
)
@pytest.mark.parametrize(("size", "expected"), [(96, 98), (50, 30)])
def test_views_are_resized_as_pillow_does(
    name: str, filter_: Image.Resampling, size: int, expected: int
) -> None:
    inputs = Inputs(InputSpec([], [], size=expected, interpolation=name))
    image = (pixels(size, 1)[0, 0] * 255).round()
    reference = np.asarray(
        Image.fromarray(image.numpy()).resize((expected, expected), filter_)
    )  # mode F: no rounding
    found = inputs(image.expand(1, 3, -1, -1))[0, 1]
    torch.testing.assert_close(found, torch.from_numpy(reference.copy()), atol=1e-2, rtol=0)


def test_it_works_in_channels_last_and_keeps_it() -> None:
    inputs = Inputs(InputSpec(OTHER.mean, OTHER.std, multiple_of=14))
    inputs.normalised_with(IMAGENET.mean, IMAGENET.std)
    views = normalised(pixels(), IMAGENET)
    found = inputs(views.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, inputs(views))
    assert found.is_contiguous(memory_format=torch.channels_last)
