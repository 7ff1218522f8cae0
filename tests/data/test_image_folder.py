"""Folders of image files."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from seed_exp.data import image_folder as module
from seed_exp.data.image_folder import ImageFolderSource
from seed_exp.data.loader import load_batches
from seed_exp.views.recipe import EvalViews


def save(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (value, 1, 2)).save(path, "PNG")


def test_sorted_sub_folders_are_the_classes_and_images_may_be_nested(tmp_path: Path) -> None:
    for value, name in enumerate(["b/2.png", "a/x/y/1.PNG", "a/0.JPEG", "c d/é.webp"]):
        save(tmp_path / name, value)
    save(tmp_path / "a" / ".hidden.png")
    save(tmp_path / ".git" / "0.png")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    source = ImageFolderSource(tmp_path)
    assert [source.key(index) for index in range(len(source))] == [
        "a/0.JPEG",
        "a/x/y/1.PNG",
        "b/2.png",
        "c d/é.webp",
    ]
    assert source.classes == ["a", "b", "c d", "empty"]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 2]
    assert [int(source.image(index)[0, 0, 0]) for index in range(4)] == [2, 1, 0, 3]
    assert source.image(0).shape == (3, 5, 6)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.key(3) == "c d/é.webp"
    assert copy.fingerprint() == source.fingerprint()


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    save(tmp_path / "1.png", 1)
    save(tmp_path / "0.png", 0)
    source = ImageFolderSource(tmp_path)
    assert source.labels is None
    assert [source.key(index) for index in range(2)] == ["0.png", "1.png"]


def test_another_split_gets_the_labels_of_the_training_classes(tmp_path: Path) -> None:
    save(tmp_path / "b" / "0.png")
    source = ImageFolderSource(tmp_path, ["a", "b"])
    assert source.labels is not None
    assert source.labels.tolist() == [1]
    with pytest.raises(ValueError, match="classes that the training images do not have: b"):
        ImageFolderSource(tmp_path, ["a", "c"])


def test_the_fingerprint_changes_with_the_names(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    before = ImageFolderSource(tmp_path).fingerprint()
    (tmp_path / "0.png").rename(tmp_path / "1.png")
    assert ImageFolderSource(tmp_path).fingerprint() != before


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        ImageFolderSource(tmp_path)
    with pytest.raises(ValueError, match=r"no folder of images at .*absent"):
        ImageFolderSource(tmp_path / "absent")


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png")
    save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"beside them \(such as stray.png\)"):
        ImageFolderSource(tmp_path)


def test_a_file_that_is_gone_or_broken_is_named(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"")
    source = ImageFolderSource(tmp_path)
    with pytest.raises(ValueError, match=r"cannot decode image '.*1.png' \(0 bytes\)"):
        source.image(1)
    (tmp_path / "0.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read image .*0.png: No such file"):
        source.image(0)


def test_files_that_cannot_be_read_are_counted_and_replaced(tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / "ab"[number % 2] / f"{number:02d}.png", number)
    source = ImageFolderSource(tmp_path)  # a: 0 2 4 6 8 10, b: 1 3 5 7 9 11
    (tmp_path / "a" / "02.png").write_bytes(b"")
    (tmp_path / "a" / "10.png").unlink()
    (tmp_path / "b" / "11.png").unlink()
    (tmp_path / "b" / "11.png").mkdir()
    found: dict[int, str] = {}
    order = [(0, np.arange(12))]
    (batch,) = load_batches(
        source, EvalViews(tiny.views_config()), order, num_workers=0, on_bad=found.__setitem__
    )
    assert batch.indices.tolist() == [0, 2, 2, 3, 4, 6, 6, 7, 8, 9, 10, 0]
    assert batch.labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0]
    assert {index: error.rpartition(": ")[2] for index, error in found.items()} == {
        1: "the file is empty",
        5: "No such file or directory",
        11: "Is a directory",
    }


def test_encoded_gives_the_file_as_it_is(tmp_path: Path) -> None:
    save(tmp_path / "0.png")
    assert ImageFolderSource(tmp_path).encoded(0) == (tmp_path / "0.png").read_bytes()


class Entry:
    """What os.scandir gives for a folder of a class, or for an image."""

    def __init__(self, name: bytes, folder: bool) -> None:
        self.name, self.path, self.folder = name, name, folder

    def is_dir(self) -> bool:
        return self.folder

    def is_file(self) -> bool:
        return not self.folder

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> os.stat_result:
        return os.stat_result((0,) * 6 + (7, 0, 0, 0))


def test_a_hundred_thousand_classes_are_listed_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num = 100_000
    classes = [Entry(b"n%08d" % number, folder=True) for number in range(num)]
    image = [Entry(b"0.jpg", folder=False)]
    root = os.fsencode(tmp_path)
    monkeypatch.setattr(
        module, "_entries", lambda folder: classes if folder.rstrip(b"/") == root else image
    )
    began = time.process_time()
    source = ImageFolderSource(tmp_path)
    assert time.process_time() - began < 30  # 1 s; minutes if a class is searched for in a list
    assert source.labels is not None
    assert np.array_equal(source.labels, np.arange(num))
    assert source.key(num - 1) == "n00099999/0.jpg"


def test_a_link_to_a_folder_around_it_is_not_followed(tmp_path: Path) -> None:
    save(tmp_path / "a" / "b" / "0.png")
    (tmp_path / "a" / "b" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "a" / "b")
    source = ImageFolderSource(tmp_path)
    assert [source.key(index) for index in range(len(source))] == ["a/b/0.png", "a/other/0.png"]
