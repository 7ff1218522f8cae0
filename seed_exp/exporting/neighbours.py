"""Images that look alike to a network: neighbours and near-duplicates, as rows of an HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.base.files import atomic_write
from seed_exp.data.sources import Source
from seed_exp.evaluation.votes import nearest
from seed_exp.exporting.neighbours_page import Chapter, Shown
from seed_exp.exporting.tables import text_of

_MOST_LINKS = 32  # other images that an image is compared with to find near-duplicates
_MOST_GROUPS = 50  # groups on the page; the list of near-duplicates has all


@dataclass(frozen=True)
class SearchedImages:
    """Images of a source with their features."""

    source: Source
    """Source of the images."""
    indices: NDArray[np.int64]
    """Indices of the images in the source [n]."""
    features: Tensor
    """Features of the images [n, D], n >= 2."""

    def shown(self, row: int, similarity: float | None = None) -> Shown:
        """Returns image `row`, from 0 to n - 1, for the page."""
        index = int(self.indices[row])
        label = -1 if self.source.labels is None else int(self.source.labels[index])
        return Shown(
            partial(self.source.image, index), text_of(self.source.key(index)), label, similarity
        )


def other_neighbours(features: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds the k nearest neighbours of images among all other images, nearest first.

    Args:
        features: Features of all images [n, D], n >= 2.
        rows: Rows of `features` whose neighbours are wanted [q], int64.
        k: Number of neighbours per image; with fewer than k others, all of them.

    Returns:
        Cosines [q, k], float32, and rows of `features` [q, k], int64, on the device of `features`.
    """
    k = min(k, len(features) - 1)
    similarities, found = nearest(features, features[rows], k + 1)
    own = found == rows[:, None]
    own[:, -1] |= ~own.any(1)  # among more than k copies of an image, it may not find itself
    return similarities[~own].view(-1, k), found[~own].view(-1, k)


def near_duplicates(features: Tensor, threshold: float) -> list[list[int]]:
    """Groups images whose cosine to the first image of their group is at least `threshold`.

    To remove near-duplicates, keep the first image of each group and leave out the others. Only
    the 32 nearest others of each image are compared with it.

    Args:
        features: Features of all images [n, D], n >= 2.
        threshold: Lowest cosine, in (0, 1].

    Returns:
        Rows of `features`, ascending in each group; the largest groups come first. A group has two
        or more rows, and no row is in two groups.
    """
    similarities, found = other_neighbours(
        features, torch.arange(len(features), device=features.device), _MOST_LINKS
    )
    # Rounding may leave the cosine of equal features just below 1.
    rows, columns = (similarities >= threshold - 1e-6).nonzero(as_tuple=True)
    links: dict[int, set[int]] = {}
    for one, other in zip(rows.tolist(), found[rows, columns].tolist(), strict=True):
        links.setdefault(one, set()).add(other)
        # Both ways, because all copies of an image have the first copies among their nearest, but
        # the first copies do not have all others.
        links.setdefault(other, set()).add(one)
    groups: list[list[int]] = []
    taken: set[int] = set()
    for first in sorted(links):
        if first not in taken and (others := links[first] - taken):
            groups.append([first, *sorted(others)])
            taken |= {first, *others}
    return sorted(groups, key=lambda group: (-len(group), group))


def write_duplicates(path: Path, images: SearchedImages, groups: Sequence[Sequence[int]]) -> None:
    """Writes one line of JSON per group: the list of the names of its images."""
    with atomic_write(path) as file:
        for group in groups:
            keys = [text_of(images.source.key(int(images.indices[row]))) for row in group]
            file.write(json.dumps(keys).encode() + b"\n")


def neighbours_of_images(images: SearchedImages, rows: Tensor, k: int) -> Chapter:
    """A chapter of the images `rows` [q], each with its k nearest others."""
    similarities, found = other_neighbours(images.features, rows.to(images.features.device), k)
    firsts = [images.shown(row) for row in rows.tolist()]
    text = (
        f"{len(firsts)} images, evenly spaced over all {len(images.indices):,}; beside each are "
        f"the {found.shape[1]} nearest others."
    )
    return _neighbours(images, firsts, similarities, found, text)


def neighbours_of_files(images: SearchedImages, files: Source, features: Tensor, k: int) -> Chapter:
    """A chapter of the images of `files`, of features [q, D], each with its k nearest `images`."""
    similarities, found = nearest(
        images.features, features.to(images.features.device), min(k, len(images.indices))
    )
    firsts = [
        Shown(partial(files.image, number), text_of(files.key(number)))
        for number in range(len(files))
    ]
    text = f"Beside each image are the {found.shape[1]} nearest of {len(images.indices):,}."
    return _neighbours(images, firsts, similarities, found, text)


def duplicates(
    images: SearchedImages, groups: Sequence[Sequence[int]], threshold: float
) -> Chapter:
    """A chapter of the largest groups of near-duplicates."""
    total = sum(map(len, groups))
    text = (
        f"{len(groups):,} groups of {total:,} images; the cosine of each image to the first of "
        f"its group is at least {threshold:g}"
    )
    text += f"; these are the {_MOST_GROUPS} largest." if len(groups) > _MOST_GROUPS else "."
    rows = []
    for first, *others in groups[:_MOST_GROUPS]:
        unit = torch.nn.functional.normalize(images.features[[first, *others]].float(), dim=1)
        cosines, order = (unit[1:] @ unit[0]).sort(descending=True)
        beside = [
            images.shown(others[position], cosine)
            for position, cosine in zip(order.tolist(), cosines.tolist(), strict=True)
        ]
        rows.append((images.shown(first), beside))
    return Chapter("Near-duplicates", text, rows)


def _neighbours(
    images: SearchedImages, firsts: Sequence[Shown], similarities: Tensor, found: Tensor, text: str
) -> Chapter:
    beside = [
        [images.shown(row, similarity) for row, similarity in zip(rows, cosines, strict=True)]
        for rows, cosines in zip(found.tolist(), similarities.tolist(), strict=True)
    ]
    return Chapter(
        "Nearest neighbours",
        f"{text} The number is the cosine.",
        list(zip(firsts, beside, strict=True)),
    )
