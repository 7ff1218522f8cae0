"""Which images look alike to a network: neighbours and near-duplicates, as rows of a gallery."""

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

_MOST_LINKS = 32  # of an image to others, for groups of near-duplicates
_MOST_GROUPS = 50  # on the page; the list has all


@dataclass(frozen=True)
class SearchedImages:
    """Images of a source with their features."""

    source: Source
    indices: NDArray[np.int64]
    """In the source [n]."""
    features: Tensor
    """[n, D], n >= 2."""

    def shown(self, row: int, similarity: float | None = None) -> Shown:
        """Image `row` of n, for the page."""
        index = int(self.indices[row])
        label = -1 if self.source.labels is None else int(self.source.labels[index])
        return Shown(
            partial(self.source.image, index), text_of(self.source.key(index)), label, similarity
        )


def other_neighbours(features: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest neighbours of images among all others, nearest first.

    Args:
        features: Of all images [n, D], n >= 2.
        rows: Which of them neighbours are looked for [q], int64.
        k: Neighbours of each; all others if there are fewer.

    Returns:
        Cosines [q, k], float32, and rows of `features` [q, k], int64, on the device of `features`.
    """
    k = min(k, len(features) - 1)
    similarities, found = nearest(features, features[rows], k + 1)
    own = found == rows[:, None]
    own[:, -1] |= ~own.any(1)  # of more than k copies of an image it may itself not be found
    return similarities[~own].view(-1, k), found[~own].view(-1, k)


def near_duplicates(features: Tensor, threshold: float) -> list[list[int]]:
    """Groups of images whose cosine to the first one of their group is at least `threshold`, the largest groups first.

    So one may keep the first of each and leave out the others. Of each image the 32 nearest others are looked at.

    Args:
        features: Of all images [n, D], n >= 2.
        threshold: In (0, 1].

    Returns:
        Rows of `features`, ascending in each group of two or more; no row is in two groups.
    """
    similarities, found = other_neighbours(
        features, torch.arange(len(features), device=features.device), _MOST_LINKS
    )
    rows, columns = (similarities >= threshold - 1e-6).nonzero(
        as_tuple=True
    )  # the cosine of equal features is 1 but for rounding
    links: dict[int, set[int]] = {}
    for one, other in zip(rows.tolist(), found[rows, columns].tolist(), strict=True):
        links.setdefault(one, set()).add(other)
        links.setdefault(other, set()).add(
            one
        )  # of many copies of an image, all have its first ones among their nearest
    groups: list[list[int]] = []
    taken: set[int] = set()
    for first in sorted(links):
        if first not in taken and (others := links[first] - taken):
            groups.append([first, *sorted(others)])
            taken |= {first, *others}
    return sorted(groups, key=lambda group: (-len(group), group))


def write_duplicates(path: Path, images: SearchedImages, groups: Sequence[Sequence[int]]) -> None:
    """Writes a line of JSON for each group: the names of its images."""
    with atomic_write(path) as file:
        for group in groups:
            keys = [text_of(images.source.key(int(images.indices[row]))) for row in group]
            file.write(json.dumps(keys).encode() + b"\n")


def neighbours_of_images(images: SearchedImages, rows: Tensor, k: int) -> Chapter:
    """The images `rows` [q] with their k nearest others."""
    similarities, found = other_neighbours(images.features, rows.to(images.features.device), k)
    firsts = [images.shown(row) for row in rows.tolist()]
    text = f"{len(firsts)} images, spread over all {len(images.indices):,}; beside each the {found.shape[1]} nearest others."
    return _neighbours(images, firsts, similarities, found, text)


def neighbours_of_files(images: SearchedImages, files: Source, features: Tensor, k: int) -> Chapter:
    """The images of `files` [q] with features [q, D], and the k of `images` that are nearest to each."""
    similarities, found = nearest(
        images.features, features.to(images.features.device), min(k, len(images.indices))
    )
    firsts = [
        Shown(partial(files.image, number), text_of(files.key(number)))
        for number in range(len(files))
    ]
    text = f"Beside each image the {found.shape[1]} nearest of {len(images.indices):,}."
    return _neighbours(images, firsts, similarities, found, text)


def duplicates(
    images: SearchedImages, groups: Sequence[Sequence[int]], threshold: float
) -> Chapter:
    """The largest groups of near-duplicates."""
    total = sum(map(len, groups))
    text = f"{len(groups):,} groups of {total:,} images; the cosine of each to the first of its group is at least {threshold:g}"
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
