"""Device half of the views: batched colour operations whose parameters differ from view to view.

The parameters are drawn on the host, so a CPU and a GPU see the same views. An operation that does
not befall a view has its neutral parameter (factor 1, hue 0, sigma 0). Nothing here makes the host
wait for a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from seed_exp.config.schema import ViewsConfig
from seed_exp.views.operations import Operation

NUM_PHOTOMETRIC_DRAWS = 10
"""Uniform numbers that the parameters of one view take."""

_BLEND_ORDERS = np.array(list(itertools.permutations(range(3))))
_CHUNK_VALUES = 1 << 18


class Column(IntEnum):
    """Columns of the parameters of a view."""

    BRIGHTNESS = 0  # factor
    CONTRAST = 1  # factor
    SATURATION = 2  # factor
    HUE = 3  # shift in turns
    FIRST = 4  # which of BRIGHTNESS, CONTRAST, SATURATION comes first,
    SECOND = 5  # second
    THIRD = 6  # and third
    BEFORE_HUE = 7  # how many of the three come before the hue
    GRAYSCALE = 8  # 1 or 0
    SIGMA = 9  # standard deviation of the blur in pixels, 0 = no blur
    FLIP = 10  # 1 or 0


def draw_parameters(draws: NDArray[np.float64], config: ViewsConfig) -> Tensor:
    """Parameters of views.

    Jitter factors are uniform in [max(0, 1 - x), 1 + x], the hue shift in [-x, x]; all 24 orders of
    the four steps are equally likely.

    Args:
        draws: Uniform numbers in [0, 1) [..., NUM_PHOTOMETRIC_DRAWS].
        config: The recipe.

    Returns:
        float32 [..., len(Column)].
    """
    jittered, order, grayscale, blurred, sigma, flipped = np.moveaxis(draws[..., 4:], -1, 0)
    low = np.array([max(0.0, 1 - change) for change in config.jitter[:3]] + [-config.jitter[3]])
    high = np.array([1 + change for change in config.jitter[:3]] + [config.jitter[3]])
    factors = low + (high - low) * draws[..., :4]
    parameters = np.empty((*draws.shape[:-1], len(Column)), dtype=np.float32)
    parameters[..., :4] = np.where(
        (jittered < config.jitter_prob)[..., None], factors, [1, 1, 1, 0]
    )
    blend_order, before_hue = np.divmod((order * 24).astype(np.int64), 4)
    parameters[..., Column.FIRST : Column.THIRD + 1] = _BLEND_ORDERS[blend_order]
    parameters[..., Column.BEFORE_HUE] = before_hue
    parameters[..., Column.GRAYSCALE] = grayscale < config.grayscale_prob
    small, large = config.blur_sigma
    parameters[..., Column.SIGMA] = np.where(
        blurred < config.blur_prob, small + (large - small) * sigma, 0
    )
    parameters[..., Column.FLIP] = flipped < config.flip_prob
    return torch.from_numpy(parameters)


def photometric(
    images: Tensor,
    parameters: Tensor,
    config: ViewsConfig,
    operations: Sequence[Operation] = (),
) -> Tensor:
    """Flip, colour jitter, grayscale, blur and normalisation of each view.

    Grayscale comes before the jitter if `config.grayscale_first`.

    Args:
        images: uint8 [M, 3, S, S].
        parameters: float32 [M, len(Column)] from `draw_parameters`, on the same device; then the
            uniform numbers of `operations`.
        config: The recipe.
        operations: Operations of plug-ins, before the normalisation.

    Returns:
        float32 [M, 3, S, S].
    """
    # On a CPU in chunks that stay in a core's cache through all operations.
    chunk = (
        max(1, _CHUNK_VALUES // images[0].numel()) if images.device.type == "cpu" else len(images)
    )
    pairs = zip(torch.split(images, chunk), torch.split(parameters, chunk), strict=True)
    return torch.cat([_photometric(part, rows, config, operations) for part, rows in pairs])


def _photometric(
    images: Tensor, parameters: Tensor, config: ViewsConfig, operations: Sequence[Operation]
) -> Tensor:
    if config.flip_prob > 0:  # first, while a pixel is one byte; it commutes with everything below
        images = _apply(_flip, images.clone(), parameters[:, Column.FLIP] > 0)
    images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if config.grayscale_prob > 0 and config.grayscale_first:
        images = _apply(grayscale, images, parameters[:, Column.GRAYSCALE] > 0)
    if config.jitter_prob > 0 and any(config.jitter):
        images = color_jitter(images, parameters)
    if config.grayscale_prob > 0 and not config.grayscale_first:
        images = _apply(grayscale, images, parameters[:, Column.GRAYSCALE] > 0)
    if config.blur_prob > 0:
        sigma = parameters[:, Column.SIGMA]
        radius = math.ceil(3 * config.blur_sigma[1])
        images = _apply(lambda rows, s: gaussian_blur(rows, s, radius), images, sigma > 0, sigma)
    column = len(Column)
    for operation in operations:
        images = operation.apply(images, parameters[:, column : column + operation.num_draws])
        column += operation.num_draws
    return normalize(images, config)


def _apply(
    operation: Callable[..., Tensor], images: Tensor, affected: Tensor, *parameters: Tensor
) -> Tensor:
    """`images` [M, ...] with `operation(images, *parameters)` in the rows where `affected` is true.

    `affected` is bool [M]; `images` may be overwritten.
    """
    apply = _apply_to_rows if images.device.type == "cpu" else _apply_and_select
    return apply(operation, images, affected, *parameters)


def _apply_to_rows(
    operation: Callable[..., Tensor], images: Tensor, affected: Tensor, *parameters: Tensor
) -> Tensor:
    if affected.all():
        return operation(images, *parameters)
    rows = affected.nonzero().squeeze(1)
    if len(rows):
        images[rows] = operation(images[rows], *(parameter[rows] for parameter in parameters))
    return images


def _apply_and_select(
    operation: Callable[..., Tensor], images: Tensor, affected: Tensor, *parameters: Tensor
) -> Tensor:
    # Only the GPU knows how many rows are affected, and asking would wait for it.
    return torch.where(affected.view(-1, 1, 1, 1), operation(images, *parameters), images)


def color_jitter(images: Tensor, parameters: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of each image, in its own order.

    Values stay in [0, 1] after every step.

    Args:
        images: float32 in [0, 1], [M, 3, H, W]; may be overwritten.
        parameters: float32 [M, len(Column)].
    """
    hue, before_hue = parameters[:, Column.HUE], parameters[:, Column.BEFORE_HUE]

    def blend(images: Tensor, position: int, chosen: Tensor) -> Tensor:
        step = parameters[:, Column.FIRST + position]
        factor = parameters.gather(1, step[:, None].long()).squeeze(1)
        return _apply(blend_step, images, chosen & (factor != 1), step, factor)

    # The hue costs more than the other three together, so it has one place here, with every image's
    # earlier steps before it.
    for position in range(3):
        images = blend(images, position, position < before_hue)
    images = _apply(adjust_hue, images, hue != 0, hue)
    for position in range(3):
        images = blend(images, position, position >= before_hue)
    return images


def blend_step(images: Tensor, step: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast or saturation: a blend with black, the mean luminance or the luminance.

    Args:
        images: float32 in [0, 1], [M, 3, H, W].
        step: The `Column` of each image's step [M].
        factor: >= 0 [M]; 0 gives black, the mean or the luminance, 1 the image itself.
    """
    step, factor = step.view(-1, 1, 1, 1), factor.view(-1, 1, 1, 1)
    gray = luminance(images)
    # int(): torch.compile takes the comparison of a tensor with an enum for False.
    base = torch.where(step == int(Column.CONTRAST), gray.mean((2, 3), keepdim=True), gray)
    base = base * (1 - factor) * (step != int(Column.BRIGHTNESS))
    return torch.addcmul(base, images, factor).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Images [M, 3, H, W] in [0, 1] whose hue is turned by `shift` [M] (in turns).

    HSV value and saturation stay.
    """
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    is_red, is_green = high == red, high == green
    difference = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    # Sixths of a turn from red. Where there is no chroma any hue gives the same gray.
    offset = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0)) + 6 * shift.view(-1, 1, 1)
    sixths = (difference / chroma.clamp_min(1e-12) + offset).remainder(6)
    share = torch.stack(
        ((sixths - 3).abs() - 1, 2 - (sixths - 2).abs(), 2 - (sixths - 4).abs()), dim=1
    )
    return torch.addcmul(low[:, None], chroma[:, None], share.clamp_(0, 1))


def luminance(images: Tensor) -> Tensor:
    """ITU-R 601 luma [M, 1, H, W] of RGB images [M, 3, H, W], as Pillow's mode L."""
    red, green, blue = (images[:, channel : channel + 1] for channel in range(3))
    return (red * 0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def grayscale(images: Tensor) -> Tensor:
    """Images [M, 3, H, W] whose three channels are their luminance."""
    return luminance(images).repeat(1, 3, 1, 1)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Images [M, 3, H, W] convolved with a normalised Gaussian of `sigma` [M] pixels.

    The Gaussian is cut at `radius` pixels. Beyond the edges the images continue with their edge
    pixels. A sigma of 0 leaves an image as it is. Float32 also under autocast.
    """
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.exp(-0.5 * (offsets / sigma[:, None].clamp_min(1e-3)).square())
    kernels = kernels / kernels.sum(1, keepdim=True)
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    # Products with band matrices: two calls whatever the radius, and every image has its own
    # kernel.
    with torch.autocast(images.device.type, enabled=False):
        return _bands(kernels, images.shape[2]) @ padded @ _bands(kernels, images.shape[3]).mT


def _bands(kernels: Tensor, size: int) -> Tensor:
    """Matrices [M, 1, size, size + K - 1]; row i is the kernel [M, K] from column i on, else 0."""
    windows = F.pad(kernels, (size - 1, size - 1)).unfold(1, size + kernels.shape[1] - 1, 1)
    return windows.flip(1)[:, None]


def _flip(images: Tensor) -> Tensor:
    return images.flip(-1)


def normalize(images: Tensor, config: ViewsConfig) -> Tensor:
    """(images - mean) / std per channel, in place, of float images in [0, 1] [..., 3, H, W]."""
    for channel, (mean, std) in enumerate(zip(config.mean, config.std, strict=True)):
        images[..., channel, :, :].sub_(mean).div_(std)
    return images


def denormalize(images: Tensor, config: ViewsConfig) -> Tensor:
    """Pictures, uint8, of normalised images [..., 3, H, W]."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return (images * std + mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
