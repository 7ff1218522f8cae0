from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from seed_exp.reporting.gallery import view_gallery


def test_a_gallery_shows_every_original_and_every_view(tmp_path: Path) -> None:
    images = [torch.full((3, 30, 50), 10, dtype=torch.uint8), torch.full((3, 400, 7), 20, dtype=torch.uint8)]
    views = {
        "global": torch.tensor([[100, 101]]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 24, 24).to(torch.uint8),
        "local": torch.tensor([[110, 111], [120, 121]]).view(2, 2, 1, 1, 1).expand(2, 2, 3, 16, 16).to(torch.uint8),
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
