"""Photo libraries as people have them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, features

from seed_exp.config.schema import DataConfig
from seed_exp.data import photos
from seed_exp.data.decode import decode, readable
from seed_exp.data.photos import PhotosSource
from seed_exp.data.sources import load_source


def save(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (value, 1, 2)).save(path, "PNG")


@pytest.fixture(autouse=True)
def _said_nothing() -> Iterator[None]:
    photos._report.cache_clear()
    yield
    photos._report.cache_clear()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "Pictures"
    for name in ("2019/07/b.jpg", "2019/a.JPG", "2020 Rome/é.png", "loose.jpeg", "val/v.jpg"):
        save(root / name)
    (root / "2019" / "IMG_1.MOV").touch()
    (root / "2019" / "IMG_2.mov").touch()
    (root / "notes").touch()
    (root / ".DS_Store").touch()
    save(root / ".thumbnails" / "0.jpg")
    return root


def test_everything_below_is_taken_without_labels(library: Path, logged: list[str]) -> None:
    source = load_source(DataConfig("photos", root=str(library)), "train")
    assert source.labels is None
    assert [source.key(index) for index in range(len(source))] == [
        "2019/07/b.jpg",
        "2019/a.JPG",
        "2020 Rome/é.png",
        "loose.jpeg",
        "val/v.jpg",
    ]
    assert source.image(2).shape == (3, 5, 6)
    assert source.fingerprint().startswith("photos:Pictures:5:")


def test_what_is_left_out_is_counted_once(library: Path, logged: list[str]) -> None:
    for _ in range(2):
        PhotosSource(library)
    assert logged == [f"WARNING {library}: 5 images; skipped 2 hidden, 2 .mov, 1 without extension"]


def test_photographs_that_a_library_would_read_are_named_with_it(
    library: Path, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (library / "2021").mkdir()
    (library / "2021" / "c.HEIC").touch()
    monkeypatch.setattr(photos, "readable", lambda name: name != "HEIF")
    assert len(PhotosSource(library)) == 5
    assert "1 .heic" in logged[0]
    assert logged[0].endswith("(pip install pillow-heif to read .heic)")
    monkeypatch.setattr(photos, "readable", lambda name: True)
    assert len(PhotosSource(library)) == 6


def test_the_home_folder_may_be_written_as_a_tilde(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(library.parent))
    assert len(load_source(DataConfig("photos", root="~/Pictures"), "train")) == 5
    with pytest.raises(ValueError, match=r"data\.root=.*/absent does not exist"):
        load_source(DataConfig("photos", root="~/absent"), "train")


def test_validation_images_are_held_out_or_in_another_folder(library: Path, tmp_path: Path) -> None:
    config = DataConfig("photos", root=str(library), val_fraction=0.4)
    assert len(load_source(config, "train")) == 3
    assert len(load_source(config, "val")) == 2
    save(tmp_path / "others" / "x" / "0.png")
    config = DataConfig("photos", root=str(library), val_root=str(tmp_path / "others"))
    assert (len(load_source(config, "train")), len(load_source(config, "val"))) == (5, 1)
    with pytest.raises(ValueError, match="no validation images"):
        load_source(DataConfig("photos", root=str(library)), "val")


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"no images anywhere below .*; found 1 \.mp4"):
        PhotosSource(tmp_path)
    with pytest.raises(ValueError, match="no folder of photographs"):
        PhotosSource(tmp_path / "a.mp4")


@pytest.mark.skipif(not readable("HEIF"), reason="pillow-heif is not installed")
def test_heic_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 10, 30)).save(buffer, "HEIF", exif=exif.tobytes())
    (tmp_path / "a.HEIC").write_bytes(buffer.getvalue())
    image = PhotosSource(tmp_path).image(0)
    assert image.shape == (3, 64, 48)
    assert (image.float().mean((1, 2)) - torch.tensor([200.0, 10, 30])).abs().max() < 8


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 10, 30)).save(buffer, "AVIF")
    assert decode(buffer.getvalue(), "x").shape == (3, 48, 64)
