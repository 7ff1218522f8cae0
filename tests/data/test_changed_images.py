"""Fingerprints notice changed images, and take copies for what they are."""

from __future__ import annotations

import base64
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rectangles import write_coco

from seed_exp.base.fingerprints import content_of, same_images, unsampled
from seed_exp.config.schema import DataConfig
from seed_exp.data.fingerprints import NUM_SAMPLED, PART_SIZE, middle_of
from seed_exp.data.sources import Source, load_source

NUM = 40


def bmp(value: int) -> bytes:
    """Images of the same size in bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(buffer, "BMP")
    return buffer.getvalue()


def write_files(root: Path, shift: int) -> None:
    for number in range(NUM):
        path = root / "ab"[number % 2] / f"{number:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bmp(number + shift))


def write_tsv(root: Path, shift: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{number}\t{number % 3}\t{base64.b64encode(bmp(number + shift)).decode()}\n"
        for number in range(NUM)
    ]
    (root / "train.tsv").write_text("".join(rows))


def write_shard(root: Path, shift: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "train-0.tar", "w") as archive:
        for number in range(NUM):
            member = tarfile.TarInfo(f"{number}.bmp")
            member.size = len(bmp(0))
            archive.addfile(member, io.BytesIO(bmp(number + shift)))


def write_pictures(root: Path, shift: int) -> None:
    write_coco(root, 3)
    for path in (root / "train2017").iterdir():
        with Image.open(path) as image:
            Image.eval(image, lambda value: 255 - value if shift else value).save(path, "BMP")


WRITERS: dict[str, tuple[Callable[[Path, int], None], dict[str, str]]] = {
    "image_folder": (write_files, {}),
    "photos": (write_files, {}),
    "torchvision": (write_files, {"name": "ImageFolder"}),
    "tsv": (write_tsv, {}),
    "shards": (write_shard, {}),
    "coco": (write_pictures, {}),
}


def load(kind: str, root: Path) -> Source:
    return load_source(DataConfig(kind, root=str(root), **WRITERS[kind][1]), "train")


@pytest.mark.parametrize("kind", WRITERS)
def test_other_images_under_the_same_names_and_sizes_are_noticed(kind: str, tmp_path: Path) -> None:
    write = WRITERS[kind][0]
    write(tmp_path / "data", 0)
    before = load(kind, tmp_path / "data").fingerprint()
    write(tmp_path / "data", 1)
    after = load(kind, tmp_path / "data").fingerprint()
    assert unsampled(after) == unsampled(before)
    assert not same_images(before, after)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_copy_of_another_time_and_place_is_the_same(kind: str, tmp_path: Path) -> None:
    WRITERS[kind][0](tmp_path / "data", 0)
    before = load(kind, tmp_path / "data").fingerprint()
    assert load(kind, tmp_path / "data").fingerprint() == before
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (0, 0))
    assert content_of(load(kind, tmp_path / "elsewhere").fingerprint()) == content_of(before)


def test_one_image_of_another_size_among_many_is_noticed(tmp_path: Path) -> None:
    for number in range(4 * NUM_SAMPLED):
        (tmp_path / f"{number:05d}.jpg").write_bytes(b"x" * 9)
    before = load("image_folder", tmp_path).fingerprint()
    (tmp_path / "00001.jpg").write_bytes(b"x" * 10)  # its bytes are not in the sample
    assert load("image_folder", tmp_path).fingerprint() != before


@pytest.mark.parametrize(
    ("kind", "old"),
    [
        ("image_folder", "image_folder:data:40:df1f954da37fe7d7"),
        ("tsv", "tsv:train.tsv:40:bf1b590cfff574a8"),
        ("shards", "shards:1:40:8179ea76a096c18f"),
    ],
)
def test_the_first_part_is_what_older_versions_wrote(kind: str, old: str, tmp_path: Path) -> None:
    WRITERS[kind][0](tmp_path / "data", 0)
    assert unsampled(load(kind, tmp_path / "data").fingerprint()) == old


def test_large_files_are_read_in_their_middle_and_absent_ones_are_no_error(tmp_path: Path) -> None:
    content = np.arange(3 * PART_SIZE, dtype="<u4").tobytes()
    (tmp_path / "a").write_bytes(content)
    start = (len(content) - PART_SIZE) // 2
    assert middle_of(tmp_path / "a") == content[start : start + PART_SIZE]
    (tmp_path / "b").write_bytes(b"short")
    assert middle_of(tmp_path / "b") == b"short"
    assert middle_of(tmp_path / "absent") == b""


def test_the_fingerprint_of_an_unreadable_image_is_no_error(tmp_path: Path) -> None:
    write_files(tmp_path, 0)
    source = load("image_folder", tmp_path)
    before = load("image_folder", tmp_path).fingerprint()
    (tmp_path / "a" / "00.bmp").unlink()
    assert source.fingerprint() != before
