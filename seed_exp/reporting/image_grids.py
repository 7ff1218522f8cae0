"""Pictures of images: the views that a recipe makes, and the neighbours that a network finds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from seed_exp.base.files import atomic_write
from seed_exp.data.order import SampleOrder
from seed_exp.data.sources import Source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.reporting.colours import INK, MUTED, OTHER, SAME
from seed_exp.views.photometric import denormalize
from seed_exp.views.recipe import TrainViews

_GAP = 6
_TITLE = 16
_BACKGROUND = "white"
_TILE = 80
"""Height and width of a neighbour in pixels."""
_FRAME = 4


def recipe_gallery(
    source: Source, views: TrainViews, path: Path, *, num_images: int = 8, epoch: int = 0
) -> None:
    """Writes the `view_gallery` of images of `source`, as training sees them in `epoch`.

    The images are evenly spread over the source.
    """
    views = TrainViews(views.config.of_size(views.size_at(epoch)), views.seed)
    shown = evenly_spaced(len(source), num_images)
    indices = shown
    if views.config.mixup:
        order = SampleOrder(len(source), 1, views.seed)
        indices = np.stack([shown, order.neighbours(epoch, shown)], 1).reshape(-1)
    images = [source.image(index) for index in indices.tolist()]
    batch = views.empty(len(images))
    views.host(images, np.full(len(images), -1), epoch, indices, batch)
    step = views.images_together
    made = {
        name: denormalize(view, views.config)[:, ::step]
        for name, view in views.device(batch).items()
    }
    view_gallery(images[::step], made, path)


def view_gallery(images: Sequence[Tensor], views: Mapping[str, Tensor], path: Path) -> None:
    """Writes a PNG with one row per image: the original, then its views.

    Views stand under the name of their resolution and keep their size in pixels. Originals are
    scaled to the height of the largest view.

    Args:
        images: Originals, uint8 [3, H, W].
        views: Views of each resolution, uint8 [V, N, 3, S, S] with N = len(images).
        path: Path of the PNG; replaced atomically.
    """
    row_height = max(batch.shape[-2] for batch in views.values())
    rows = [
        [
            _scaled(_picture(image), row_height),
            *(_picture(view) for batch in views.values() for view in batch[:, number]),
        ]
        for number, image in enumerate(images)
    ]
    titles = ["original", *(name for name, batch in views.items() for _ in batch)]
    font = ImageFont.load_default()
    widths = [
        max(math.ceil(font.getlength(title)), *(picture.width for picture in column))
        for title, column in zip(titles, zip(*rows, strict=True), strict=True)
    ]
    size = (
        _GAP + sum(width + _GAP for width in widths),
        _GAP + _TITLE + len(rows) * (row_height + _GAP),
    )
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    left = _GAP
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        draw.text((left, _GAP), title, fill="black", font=font)
        for number, row in enumerate(rows):
            canvas.paste(row[column], (left, _GAP + _TITLE + number * (row_height + _GAP)))
        left += width + _GAP
    with atomic_write(path) as file:
        canvas.save(file, format="PNG")


class Neighbours(NamedTuple):
    """Nearest neighbours that a network finds."""

    queries: Sequence[int]
    """Images whose neighbours are found [Q], of one source."""
    found: Sequence[Sequence[int]]
    """Neighbours of each query [Q, k], of the same source or another; nearest first."""
    cosines: Sequence[Sequence[float]]
    """Similarities of query and neighbour [Q, k]."""


def neighbours_gallery(queries: Source, bank: Source, neighbours: Neighbours, path: Path) -> None:
    """Writes a PNG with one row per query: the image, then its neighbours with their cosines.

    Where both have a class, the frame of a neighbour is green if the classes are equal, else red.

    Args:
        queries: Source of the queries.
        bank: Source of the neighbours.
        neighbours: Indices into both sources, and the cosines.
        path: Path of the PNG; replaced atomically.

    Raises:
        ValueError: an image cannot be read.
    """
    num_neighbours = max(map(len, neighbours.found))
    cell, line = _TILE + 2 * _FRAME + _GAP, _TITLE + _TILE + 2 * _FRAME + _GAP
    size = (
        _GAP + cell // 2 + (1 + num_neighbours) * cell,
        _GAP + _TITLE + len(neighbours.queries) * line,
    )
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default()
    offset = _GAP + cell // 2  # half a cell between the query and its neighbours
    draw.text((_GAP + _FRAME, _GAP), "query", fill=MUTED, font=font)
    draw.text(
        (offset + cell + _FRAME, _GAP),
        "nearest neighbours, with their cosines",
        fill=MUTED,
        font=font,
    )
    for row, (query, found, cosines) in enumerate(
        zip(neighbours.queries, neighbours.found, neighbours.cosines, strict=True)
    ):
        top = _GAP + _TITLE + row * line
        label = _label(queries, query)
        canvas.paste(_tile(queries.image(query), _BACKGROUND), (_GAP, top))
        draw.text(
            (_GAP + _FRAME, top + cell - _GAP),
            "" if label < 0 else f"class {label}",
            fill=INK,
            font=font,
        )
        for column, (index, cosine) in enumerate(zip(found, cosines, strict=True), 1):
            other = _label(bank, index)
            colour = _BACKGROUND if min(label, other) < 0 else SAME if label == other else OTHER
            left = offset + column * cell
            canvas.paste(_tile(bank.image(index), colour), (left, top))
            draw.text((left + _FRAME, top + cell - _GAP), f"{cosine:.3f}", fill=INK, font=font)
    with atomic_write(path) as file:
        canvas.save(file, format="PNG")


def _label(source: Source, index: int) -> int:
    return -1 if source.labels is None else int(source.labels[index])


def _tile(image: Tensor, colour: str) -> Image.Image:
    """The whole image in a square with a frame; a small one is enlarged by a whole factor."""
    picture = _picture(image)
    largest = max(picture.size)
    factor = _TILE / largest if largest > _TILE else _TILE // largest
    width, height = (max(1, round(side * factor)) for side in picture.size)
    picture = picture.resize(
        (width, height), Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BILINEAR
    )
    tile = Image.new("RGB", (_TILE + 2 * _FRAME,) * 2, colour)
    tile.paste(_BACKGROUND, (_FRAME, _FRAME, _FRAME + _TILE, _FRAME + _TILE))
    tile.paste(picture, (_FRAME + (_TILE - width) // 2, _FRAME + (_TILE - height) // 2))
    return tile


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _scaled(picture: Image.Image, height: int) -> Image.Image:
    """The picture at `height` pixels, or lower if it would be wider than twice that."""
    factor = min(height / picture.height, 2 * height / picture.width)
    return picture.resize(
        (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    )
