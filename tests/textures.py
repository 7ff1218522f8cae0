"""Images of rectangles with textures, and masks of them, in the layouts that `segment` reads.

Synthetic: stripes, dots and a plain colour on noise, of random places and sizes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES = 4
"""Background (0), horizontal stripes, vertical stripes, dots."""
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, *[224] * 756]


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [H, W, 3] and classes uint8 [H, W]; an outline of 255 around each rectangle."""
    draws = np.random.default_rng(seed)
    height, width = (int(side) for side in draws.integers(48, 81, 2))
    pixels = draws.integers(100, 140, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    textures = [rows // 2 % 2, columns // 2 % 2, (rows // 2 + columns // 2) % 2]
    for left in (2, width // 2 + 2):
        top, number = int(draws.integers(2, 10)), int(draws.integers(1, NUM_CLASSES))
        bottom, right = height - int(draws.integers(3, 10)), left + width // 2 - 5
        mask[top - 1 : bottom + 1, left - 1 : right + 1] = 255
        mask[top:bottom, left:right] = number
        inside = mask == number
        pixels[inside] = (60 + 140 * textures[number - 1][inside])[:, None]
    return pixels, mask


def write_masks(
    home: Path, parts: dict[str, tuple[int, int]], kind: str = "mask_folder"
) -> dict[str, np.ndarray]:
    """Writes images and masks of each part: its first seed and number of images.

    Args:
        home: data.root.
        parts: `train` and `val`.
        kind: Layout, as data.source calls it; masks of VOC have a palette.

    Returns:
        Classes of each image by path below the folder of images.
    """
    layouts = {
        "mask_folder": ("images/{}", "masks/{}"),
        "ade20k": ("images/{}", "annotations/{}"),
        "voc_masks": ("JPEGImages", "SegmentationClass"),
    }
    ade = {"train": "training", "val": "validation"}
    written = {}
    for part, (first, num) in parts.items():
        folders = [
            home / folder.format(ade[part] if kind == "ade20k" else part)
            for folder in layouts[kind]
        ]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        names = [f"{part}{index}" for index in range(num)]
        for seed, name in enumerate(names, start=first):
            pixels, mask = draw(seed)
            written[name] = mask
            Image.fromarray(pixels).save(folders[0] / f"{name}.jpg", quality=95)
            image = Image.fromarray(
                np.where(mask == 255, 0, mask + 1) if kind == "ade20k" else mask
            )
            if kind == "voc_masks":
                image = image.convert("L")
                image.putpalette(PALETTE)
            image.save(folders[1] / f"{name}.png")
        if kind == "voc_masks":
            lists = home / "ImageSets" / "Segmentation"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{part}.txt").write_text("\n".join(names) + "\n")
    return written
