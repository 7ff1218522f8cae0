"""Pictures of views, to see what a recipe does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from seed_exp.data.sources import Source
from seed_exp.evaluation.features import spread
from seed_exp.files import atomic_write
from seed_exp.views.photometric import denormalize
from seed_exp.views.recipe import TrainViews

_GAP = 6
_TITLE = 16
_BACKGROUND = "white"


def recipe_gallery(source: Source, views: TrainViews, path: Path, *, num_images: int = 8, epoch: int = 0) -> None:
    """Writes the `view_gallery` of images evenly spread over `source`, as training sees them in `epoch`."""
    indices = spread(len(source), num_images)
    images = [source.image(index) for index in indices.tolist()]
    batch = views.empty(len(images))
    views.host(images, np.full(len(images), -1), epoch, indices, batch)
    made = views.device(batch)
    view_gallery(images, {name: denormalize(view, views.config) for name, view in made.items()}, path)


def view_gallery(images: Sequence[Tensor], views: Mapping[str, Tensor], path: Path) -> None:
    """Writes a PNG with one row per image: the original, then its views, under the name of their resolution.

    Views keep their size in pixels; originals are scaled to the height of the largest view.

    Args:
        images: Originals, uint8 [3, H, W].
        views: Views of each resolution, uint8 [V, N, 3, S, S] with N = len(images).
        path: The file.
    """
    row_height = max(batch.shape[-2] for batch in views.values())
    rows = [
        [_scaled(_picture(image), row_height), *(_picture(view) for batch in views.values() for view in batch[:, number])]
        for number, image in enumerate(images)
    ]
    titles = ["original", *(name for name, batch in views.items() for _ in batch)]
    font = ImageFont.load_default()
    widths = [
        max(math.ceil(font.getlength(title)), *(picture.width for picture in column))
        for title, column in zip(titles, zip(*rows, strict=True), strict=True)
    ]
    size = (_GAP + sum(width + _GAP for width in widths), _GAP + _TITLE + len(rows) * (row_height + _GAP))
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


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _scaled(picture: Image.Image, height: int) -> Image.Image:
    """`picture` at `height` pixels, or lower where it would be more than twice as wide as high."""
    factor = min(height / picture.height, 2 * height / picture.width)
    return picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))))
