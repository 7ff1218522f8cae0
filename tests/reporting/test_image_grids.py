from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seed_exp.reporting.colours import OTHER, SAME
from seed_exp.reporting.image_grids import Neighbours, neighbours_gallery, view_gallery


def test_a_gallery_shows_every_original_and_every_view(tmp_path: Path) -> None:
    images = [
        torch.full((3, 30, 50), 10, dtype=torch.uint8),
        torch.full((3, 400, 7), 20, dtype=torch.uint8),
    ]
    views = {
        "global": torch.tensor([[100, 101]])
        .view(1, 2, 1, 1, 1)
        .expand(1, 2, 3, 24, 24)
        .to(torch.uint8),
        "local": torch.tensor([[110, 111], [120, 121]])
        .view(2, 2, 1, 1, 1)
        .expand(2, 2, 3, 16, 16)
        .to(torch.uint8),
    }
    path = tmp_path / "folder" / "gallery.png"
    view_gallery(images, views, path)
    values, counts = np.unique(np.array(Image.open(path))[:, :, 0], return_counts=True)
    area = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert area[10] >= 24 * 40
    assert area[20] >= 24
    assert all(area[value] >= 24 * 24 for value in (100, 101))
    assert all(area[value] >= 16 * 16 for value in (110, 111, 120, 121))


def test_a_gallery_of_one_pixel_images_works(tmp_path: Path) -> None:
    view_gallery(
        [torch.zeros(3, 1, 1, dtype=torch.uint8)],
        {"global": torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8)},
        tmp_path / "a.png",
    )
    assert Image.open(tmp_path / "a.png").height > 8


class Plain:
    """Images of one red each, which no letter has, of 50 x 20 pixels, the last one of a pixel."""

    def __init__(self, reds: list[int], labels: list[int] | None) -> None:
        self.reds, self.labels = reds, None if labels is None else np.array(labels)

    def image(self, index: int) -> torch.Tensor:
        size = (1, 1) if index == len(self.reds) - 1 else (50, 20)
        return (
            torch.tensor([self.reds[index], 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, *size)
        )


def areas(path: Path) -> dict[tuple[int, int, int], int]:
    colours, counts = np.unique(
        np.array(Image.open(path)).reshape(-1, 3), axis=0, return_counts=True
    )
    return dict(zip(map(tuple, colours.tolist()), counts.tolist(), strict=True))


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize(
    ("labels", "num_same", "num_other"), [([4, 5, 4], 3, 2), (None, 0, 0), ([-1, 5, 4], 2, 1)]
)
def test_neighbours_are_framed_by_whether_they_are_of_the_class_of_the_query(
    tmp_path: Path, labels: list[int] | None, num_same: int, num_other: int
) -> None:
    queries, bank = Plain([21, 22, 23], [4, 5, 4]), Plain([51, 52, 53], labels)
    found = Neighbours([0, 1], [[0, 1, 2], [1, 0]], [[0.9, 0.8, 0.7], [1.0, -0.5]])
    neighbours_gallery(queries, bank, found, tmp_path / "folder" / "gallery.png")
    area = areas(tmp_path / "folder" / "gallery.png")
    frame = 4 * 4 * 84
    assert (area.get(rgb(SAME), 0), area.get(rgb(OTHER), 0)) == (
        num_same * frame,
        num_other * frame,
    )
    reds = {red: count for (red, green, blue), count in area.items() if red > green == blue == 0}
    assert reds == {21: 1000, 22: 1000, 51: 2000, 52: 2000, 53: 80 * 80}
