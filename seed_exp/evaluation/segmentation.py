"""Classes of pixels: what the masks show, what networks predict, and how well the two agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.config.schema import IGNORED, Precision, ViewsConfig
from seed_exp.data.images_and_masks import ImagesAndMasks
from seed_exp.data.loader import load_batches
from seed_exp.engine import distributed
from seed_exp.engine.precision import autocast
from seed_exp.methods.segmentation import enlarged
from seed_exp.views.masked import ShorterSide, resized

_BATCH_SIZE = 16  # square images that workers read ahead; windows per forward pass
_LARGEST = 1 << 28  # bytes of enlarged logits at once
_LONGEST = 16  # times the shorter side

Logits = Callable[[Tensor], Tensor]
"""From images [n, 3, S, S] to logits [n, C, h, w]."""


class Survey(NamedTuple):
    """Sizes and classes of a whole set of images with masks."""

    pixels: NDArray[np.int64]
    """Number of pixels of each value [256]."""
    elongation: float
    """Longer side of an image divided by its shorter one, at most."""


def survey(source: ImagesAndMasks, num_threads: int, *, tolerant: bool) -> Survey:
    """Reads every mask and the header of every image; the processes share the work.

    Args:
        source: Images and masks.
        num_threads: Masks that are read at once.
        tolerant: Whether an image that cannot be read is left to the training, which skips it.

    Raises:
        ValueError: a mask cannot be read, has another size than its image, or a class that the
            source has not; or an image cannot be read or is a strip.
    """
    own = np.array_split(np.arange(len(source)), distributed.world_size())[distributed.rank()]
    pixels, elongation, problem = np.zeros(IGNORED + 1, np.int64), 1.0, None
    look = partial(_look, source, tolerant=tolerant)
    try:
        with ThreadPoolExecutor(max(1, num_threads)) as threads:
            for found in threads.map(look, own.tolist()):
                if found is not None:
                    pixels += found.pixels
                    elongation = max(elongation, found.elongation)
    except ValueError as error:
        problem = str(error)
    parts = distributed.gather_objects((pixels, elongation, problem))
    problems = [problem for *_, problem in parts if problem is not None]
    if problems:
        raise ValueError(problems[0])
    return Survey(np.stack([part[0] for part in parts]).sum(0), max(part[1] for part in parts))


def _look(source: ImagesAndMasks, index: int, *, tolerant: bool) -> Survey | None:
    try:
        size = source.size(index)
    except ValueError:
        if tolerant:
            return None
        raise
    elongation = max(size) / min(size)
    if elongation > _LONGEST:
        raise ValueError(
            f"image {source.key(index)} is {list(size)} pixels high and wide; segment takes images "
            f"whose longer side is at most {_LONGEST} times the shorter one"
        )
    counts = np.bincount(source.mask(index, size).numpy().ravel(), minlength=IGNORED + 1)
    return Survey(counts, elongation)


@torch.no_grad()
def segment_images(
    networks: Mapping[str, Logits],
    source: ImagesAndMasks,
    views: ViewsConfig,
    crop_size: int,
    elongation: float,
    device: torch.device,
    num_workers: int,
    precision: Precision,
) -> dict[str, dict[str, float]]:
    """Measures of each network on all images; several processes share them and all get the result.

    An image is resized until its shorter side is that of a crop. Logits are those of windows of a
    crop's size, two thirds of it apart, averaged where windows overlap; they are enlarged to the
    mask's size, bilinearly.

    Args:
        networks: Networks by name, in evaluation mode.
        source: Images and masks, with the number of classes.
        views: Normalisation.
        crop_size: Side of a window in pixels.
        elongation: As `survey` gives it.
        device: Device of the networks.
        num_workers: Worker processes per rank that read images.
        precision: Precision of the forward pass.

    Returns:
        As `agreement`, by network; NaN for one with logits that are not finite.

    Raises:
        ValueError: an image or a mask cannot be read.
    """
    num_classes = source.num_classes
    assert num_classes is not None
    own = np.array_split(np.arange(len(source)), distributed.world_size())[distributed.rank()]
    # Images lie in squares of their longest side: as many as have the pixels of a usual batch.
    num = max(1, int(_BATCH_SIZE / elongation**2))
    order = [(0, own[start : start + num]) for start in range(0, len(own), num)]
    shown = ShorterSide(views, crop_size, math.ceil(crop_size * elongation))
    counts = {
        name: torch.zeros(num_classes + 1, num_classes, dtype=torch.int64, device=device)
        for name in networks
    }
    with closing(
        load_batches(source.images, shown, order, num_workers=num_workers, device=device)
    ) as batches:
        for batch in batches:
            for square, index in zip(
                shown.device(batch)["global"][0], batch.indices.tolist(), strict=True
            ):
                size = source.size(index)
                height, width = resized(*size, crop_size)
                image, mask = square[:, :height, :width], source.mask(index, size).to(device)
                for name, network in networks.items():
                    with autocast(precision, device):
                        logits = _logits(network, image, crop_size)
                    predicted = _classes(logits, size)
                    counts[name][:-1] += confusion(predicted, mask, num_classes)
                    counts[name][-1, 0] += ~logits.isfinite().all()
    found = {}
    for name, count in counts.items():
        total = distributed.all_gather(count[None]).sum(0)
        measures = agreement(total[:-1])
        found[name] = dict.fromkeys(measures, math.nan) if total[-1, 0] > 0 else measures
    return found


def confusion(predicted: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Numbers of pixels [C, C] by true class (rows) and predicted class; IGNORED does not count.

    Args:
        predicted: Classes [H, W], int64.
        mask: True classes [H, W], uint8.
        num_classes: Number of classes C.
    """
    counted = mask != IGNORED
    cells = mask[counted].long() * num_classes + predicted[counted]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def agreement(counts: Tensor) -> dict[str, float]:
    """Measures of segmentation, in percent.

    "miou" is the mean over classes of intersection over union, each over all pixels of all images;
    classes that neither the masks nor the predictions have do not count. "pixel_accuracy" is the
    share of pixels whose class is predicted.

    Args:
        counts: Numbers of pixels, as `confusion` gives them [C, C].
    """
    counts = counts.double().cpu()
    right = counts.diag()
    union = counts.sum(0) + counts.sum(1) - right
    there = union > 0
    return {
        "miou": 100 * float((right[there] / union[there]).mean()),
        "pixel_accuracy": 100 * float(right.sum() / counts.sum()),
    }


def windows(height: int, width: int, size: int) -> Iterator[tuple[int, int]]:
    """Upper left corners of squares that cover an image, two thirds of a side apart at most.

    The last ones end where the image does.

    Args:
        height: Height of the image in pixels, at least `size`.
        width: Its width, at least `size`.
        size: Side of the squares.
    """
    stride = 2 * size // 3
    tops, lefts = (
        [min(start, side - size) for start in range(0, side - size + stride, stride)]
        for side in (height, width)
    )
    return ((top, left) for top in tops for left in lefts)


def _logits(network: Logits, image: Tensor, size: int) -> Tensor:
    """Logits [1, C, H, W] of an image [3, H, W]: means over windows."""
    places = list(windows(image.shape[1], image.shape[2], size))
    total, number = None, image.new_zeros(image.shape[1:])
    for start in range(0, len(places), _BATCH_SIZE):
        some = places[start : start + _BATCH_SIZE]
        parts = [image[:, top : top + size, left : left + size] for top, left in some]
        logits = enlarged(network(torch.stack(parts)), (size, size))
        if total is None:
            total = logits.new_zeros(logits.shape[1], *image.shape[1:])
        for part, (top, left) in zip(logits, some, strict=True):
            total[:, top : top + size, left : left + size] += part
            number[top : top + size, left : left + size] += 1
    assert total is not None
    return (total / number)[None]


def _classes(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Class with the largest logit, at the size of the mask: int64 [H, W]."""
    # Some classes at a time: the logits of a photograph of 12 megapixels would be gigabytes.
    at_once = max(1, _LARGEST // (4 * math.prod(size)))
    best = predicted = None
    for first in range(0, logits.shape[1], at_once):
        values, classes = enlarged(logits[:, first : first + at_once], size)[0].max(0)
        if best is None or predicted is None:
            best, predicted = values, classes
        else:
            predicted = torch.where(values > best, classes + first, predicted)
            best = torch.maximum(values, best)
    assert predicted is not None
    return predicted
