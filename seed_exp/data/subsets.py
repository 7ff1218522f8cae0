"""Choices of images from a source: a share of each class, names on a list, or evenly spaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seed_exp.data.image_folder import EXTENSIONS

_NUM_SHOWN = 3  # names in an error


def share_of_each_class(
    labels: NDArray[np.int64], fraction: float, seed: int, *, at_least: int = 0
) -> NDArray[np.int64]:
    """`fraction` of each class, chosen at random: a pure function of the arguments.

    A smaller fraction chooses part of what a larger one chooses.

    Args:
        labels: Class of each image [n], any integers. Images without a label share one number and
            so form a class.
        fraction: Share of each class's images, 0 to 1; their number is rounded.
        seed: 0 to 2^63 - 1.
        at_least: Images taken of each class whatever the fraction, as far as the class has so many.

    Returns:
        Indices [m], ascending.
    """
    # Sorted random words and not Generator.permutation, whose result may change with NumPy's
    # version.
    shuffled = np.argsort(np.random.Philox(key=seed).random_raw(len(labels)), kind="stable")
    # Sorted by class, in random order within each class.
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[shuffled], return_index=True, return_counts=True)
    sizes = np.maximum(np.rint(counts * fraction).astype(np.int64), np.minimum(at_least, counts))
    ranks = np.arange(len(labels)) - np.repeat(starts, counts)
    return np.sort(shuffled[ranks < np.repeat(sizes, counts)])


def images_named_in(file: Path, key: Callable[[int], str], num_images: int) -> NDArray[np.int64]:
    """Indices of the images that a text file names, one name a line.

    A name may lack the extension and the first folders of the image's key. SimCLR's lists of 1 %
    and 10 % of ImageNet (imagenet_subsets/1percent.txt in its repository) have this format: the
    line n01440764_10026.JPEG stands for the image with the key n01440764_10026.JPEG,
    n01440764/n01440764_10026.JPEG or train/n01440764_10026.

    Args:
        file: The list; empty lines are skipped.
        key: Returns the key of an image by its index in the source.
        num_images: Number of images in the source.

    Returns:
        Indices [m], ascending, whatever the order of the list.

    Raises:
        ValueError: no such file, it is empty, or a name stands for no image or for several.
    """
    if not file.is_file():
        raise ValueError(
            f"no list of images at data.subset={file}; "
            "expected a text file with the name of an image in each line"
        )
    names = {_bare(line.strip()) for line in file.read_text().splitlines() if line.strip()}
    if not names:
        raise ValueError(f"data.subset={file} names no images")
    depths = {name.count("/") for name in names}
    found: dict[str, int] = {}
    for index in range(num_images):
        parts = _bare(key(index)).split("/")
        for name in {"/".join(parts[-depth - 1 :]) for depth in depths} & names:
            if name in found:
                raise ValueError(
                    f"{name} in data.subset={file} is the name of several images, "
                    f"{key(found[name])} and {key(index)}; give the names with their folders"
                )
            found[name] = index
    if missing := sorted(names - found.keys()):
        shown = ", ".join(missing[:_NUM_SHOWN])
        raise ValueError(
            f"{len(missing)} of {len(names)} images in data.subset={file} are not among the "
            f"training images: {shown}{', ...' if len(missing) > _NUM_SHOWN else ''}; "
            f"their names are like {key(0)}"
        )
    return np.sort(np.fromiter(found.values(), np.int64))


def _bare(name: str) -> str:
    """`name` without the extension of an image file."""
    stem, dot, extension = name.rpartition(".")
    return stem if f"{dot}{extension}".lower() in EXTENSIONS else name


def evenly_spaced(num_images: int, at_most: int | None = None) -> NDArray[np.int64]:
    """Indices of up to `at_most` of `num_images` images (None = all), always the same choice.

    The images are divided into `at_most` equal stretches and one is drawn from each. The choice
    covers all classes if the images are sorted by class (thanks to the stretches) and if the
    classes take turns (thanks to the draw).
    """
    num = num_images if at_most is None else min(at_most, num_images)
    edges = np.arange(num + 1, dtype=np.int64) * num_images // num
    return edges[:-1] + np.floor(np.random.default_rng(0).random(num) * np.diff(edges)).astype(
        np.int64
    )
