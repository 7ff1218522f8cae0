"""Layouts of images with masks, read from small made-up folders, and what is wrong with others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from textures import write_masks

from seed_exp.config.schema import DataConfig
from seed_exp.data.images_and_masks import ImagesAndMasks
from seed_exp.data.mask_sets import MaskedImages
from seed_exp.data.sources import load_source

PARTS = {"train": (0, 5), "val": (50, 2)}


def load(kind: str, root: Path, split: Any = "train", **options: Any) -> ImagesAndMasks:
    return ImagesAndMasks(load_source(DataConfig(kind, str(root), **options), split))


@pytest.mark.parametrize("kind", ["mask_folder", "ade20k", "voc_masks"])
def test_a_layout_gives_each_image_its_mask(tmp_path: Path, kind: str) -> None:
    made, copy = tmp_path / "made", tmp_path / "VOCdevkit" / "VOC2012"
    written = write_masks(made, PARTS, kind)
    assert load(kind, made).num_classes == {"voc_masks": 21, "ade20k": 150}.get(kind)
    for split, (_, num) in PARTS.items():
        source = load(kind, made, split)
        assert len(source) == num
        for index in range(num):
            name = Path(source.key(index)).stem
            pair = source.image(index)
            assert (pair[3].numpy() == written[name]).all()
            assert source.size(index) == tuple(pair.shape[1:])
    prints = {load(kind, made, split).fingerprint() for split in PARTS}
    shutil.copytree(made, copy)
    root = copy.parent if kind == "voc_masks" else copy
    assert {load(kind, root, split).fingerprint() for split in PARTS} == prints
    # Another mask is another data set.
    folder = {"voc_masks": "SegmentationClass", "ade20k": "annotations/training"}.get(
        kind, "masks/train"
    )
    changed = Image.fromarray(np.full_like(written["train3"], 2))
    changed.save(copy / folder / "train3.png")
    assert load(kind, root).fingerprint() not in prints


def test_a_folder_without_splits_is_divided_and_a_share_of_the_images_is_taken(
    tmp_path: Path,
) -> None:
    written = write_masks(tmp_path, {"train": (0, 10)})
    for folder in ("images", "masks"):
        shutil.move(tmp_path / folder / "train", tmp_path / "x")
        (tmp_path / folder).rmdir()
        shutil.move(tmp_path / "x", tmp_path / folder)
    train, val = (
        load("mask_folder", tmp_path, split, val_fraction=0.2) for split in ("train", "val")
    )
    half = load("mask_folder", tmp_path, val_fraction=0.2, fraction=0.5)
    assert (len(train), len(val), len(half)) == (8, 2, 4)
    names = [[Path(each.key(index)).stem for index in range(len(each))] for each in (train, val)]
    assert set(names[0]) | set(names[1]) == written.keys()
    for index in range(4):
        assert (half.image(index)[3].numpy() == written[Path(half.key(index)).stem]).all()


def test_masks_fit_images_that_their_camera_turned(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "images" / "a.jpg", exif=exif)
    Image.new("1", (20, 30), 1).save(tmp_path / "masks" / "a.png")
    source = load("mask_folder", tmp_path)
    assert source.size(0) == (30, 20)
    assert torch.equal(source.image(0)[3], torch.ones(30, 20, dtype=torch.uint8))


def test_what_is_wrong_with_a_mask_is_said_with_its_name(tmp_path: Path) -> None:
    write_masks(tmp_path, {"train": (0, 1)}, "ade20k")
    file = tmp_path / "annotations" / "training" / "train0.png"
    size = Image.open(file).size
    wrong: dict[str, Image.Image | bytes] = {
        r"is a colour image \(RGB\)": Image.new("RGB", size),
        r"has the value 151; the classes are 1 to 150, and 0 is ignored": Image.new("L", size, 151),
        r"has the value 1000; classes are numbered up to 254": Image.new("I;16", size, 1000),
        r"is \[6, 5\] pixels high and wide, its image .*train0\.jpg is": Image.new("L", (5, 6)),
        r"cannot read mask .*train0\.png: not a whole PNG": file.read_bytes()[:60],
    }
    for message, content in wrong.items():
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            content.save(file)
        with pytest.raises(ValueError, match=message):
            load("ade20k", tmp_path).image(0)
    Image.new("L", size, 150).save(file)
    assert int(load("ade20k", tmp_path).image(0)[3].max()) == 149


def test_files_that_are_absent_are_named(tmp_path: Path) -> None:
    write_masks(tmp_path / "m", PARTS)
    write_masks(tmp_path / "v", PARTS, "voc_masks")
    (tmp_path / "m" / "masks" / "train" / "train2.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 of 5 images have no mask: .*train2\.jpg needs .*train2\.png"
    ):
        load("mask_folder", tmp_path / "m")
    with pytest.raises(ValueError, match=r"no folder .*annotations/training|images/training"):
        load("ade20k", tmp_path / "m")
    with pytest.raises(ValueError, match=r"should be the folder that holds VOC2012/ImageSets"):
        load("voc_masks", tmp_path / "m")
    (tmp_path / "v" / "ImageSets" / "Segmentation" / "train.txt").write_text("")
    with pytest.raises(ValueError, match=r"train\.txt names no image"):
        load("voc_masks", tmp_path / "v")
    with pytest.raises(ValueError, match="has images without masks"):
        load("digits", tmp_path)
    assert isinstance(
        load_source(DataConfig("voc_masks", str(tmp_path / "v")), "val"), MaskedImages
    )
