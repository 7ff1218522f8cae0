"""Images of coloured rectangles on grey, with annotations in the layouts of VOC and COCO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"aeroplane": (220, 40, 40), "bicycle": (40, 220, 40), "bird": (40, 40, 220)}
Box = tuple[int, int, int, int]
"""Left, top, right, bottom; the last two beyond the rectangle."""


def draw(path: Path, seed: int) -> tuple[tuple[int, int], list[tuple[str, Box]]]:
    """Writes an image with two rectangles beside each other.

    Returns height and width, and the rectangles with their names.
    """
    draws = np.random.default_rng(seed)
    height, width = (int(side) for side in draws.integers(48, 65, 2))
    pixels = draws.integers(100, 140, (height, width, 3), dtype=np.uint8)
    found = []
    for first in (2, width // 2 + 2):
        left, right = (
            first + int(draws.integers(0, 4)),
            first + int(draws.integers(14, width // 2 - 4)),
        )
        top, bottom = int(draws.integers(2, 16)), int(draws.integers(30, height - 2))
        name = str(draws.choice(list(COLOURS)))
        pixels[top:bottom, left:right] = COLOURS[name]
        found.append((name, (left, top, right, bottom)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)
    return (height, width), found


def write_voc(root: Path, num: int = 4) -> dict[str, tuple[tuple[int, int], list[tuple[str, Box]]]]:
    """Writes a VOCdevkit with `num` images in each part.

    In the test part the first object of each image is difficult.
    """
    written = {}
    for number, (year, part) in enumerate(
        (("VOC2007", "trainval"), ("VOC2012", "trainval"), ("VOC2007", "test"))
    ):
        names = [f"{part}{index}" for index in range(num)]
        for index, name in enumerate(names):
            size, found = draw(root / year / "JPEGImages" / f"{name}.jpg", 100 * number + index)
            written[f"{year}/{name}"] = size, found
            objects = [
                f"<object><name>{kind}</name>"
                f"<difficult>{int(part == 'test' and first)}</difficult>"
                f"<bndbox><xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
                f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
                for (kind, (left, top, right, bottom)), first in zip(
                    found, (True, False), strict=True
                )
            ]
            folder = root / year / "Annotations"
            folder.mkdir(parents=True, exist_ok=True)
            sizes = (
                f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
            )
            (folder / f"{name}.xml").write_text(
                f"<annotation>{sizes}{''.join(objects)}</annotation>"
            )
        lists = root / year / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{part}.txt").write_text("\n".join(names) + "\n")
    return written


def write_coco(root: Path, num: int = 4) -> dict[str, list[tuple[str, Box]]]:
    """Writes a COCO 2017 with `num` images in each part.

    Category numbers have gaps, and image numbers are not in order. The last image of each part has
    a crowd instead of its second object; a further image has no object.
    """
    ids = dict(zip(COLOURS, (3, 7, 90), strict=True))
    written = {}
    for number, part in enumerate(("train2017", "val2017")):
        content: dict[str, list[Any]] = {"images": [], "annotations": []}
        content["categories"] = [
            {"id": category, "name": name} for name, category in reversed(ids.items())
        ]
        for index in range(num + 1):
            name = f"{index:012}.jpg"
            (height, width), found = draw(root / part / name, 1000 + 100 * number + index)
            content["images"].append(
                {"id": 500 - index, "file_name": name, "height": height, "width": width}
            )
            found = found if index < num else []
            written[f"{part}/{name}"] = found
            for position, (kind, (left, top, right, bottom)) in enumerate(found):
                crowd = int(index == num - 1 and position == 1)
                corners = [left, top, right, top, right, bottom, left, bottom]
                runs = np.zeros((height, width), np.uint8)
                runs[top:bottom, left:right] = 1
                annotation = {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 500 - index,
                    "category_id": ids[kind],
                }
                annotation |= {
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                }
                outline = (
                    {"size": [height, width], "counts": run_lengths(runs)} if crowd else [corners]
                )
                content["annotations"].append(
                    {**annotation, "iscrowd": crowd, "segmentation": outline}
                )
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return written


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed code: lengths of runs of 0, 1, 0, ... down the columns."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *ends, len(flat)]).tolist()
    return lengths if flat[0] == 0 else [0, *lengths]
