"""Sources by name, and how training and validation images are told apart."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from seed_exp.config.schema import DataConfig
from seed_exp.data.sources import SOURCES, Source, Split, Subset, hold_out, load_source

CONF = Path(__file__).parents[2] / "conf" / "data"


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tsv(path: Path, rows: int, classes: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = "{0}\t{1}\t{2}\n"
    path.write_text(
        "".join(
            line.format(f"{path.stem}{i}", i % classes, base64.b64encode(png(i)).decode())
            for i in range(rows)
        )
    )
    return path


def write_folder(path: Path, classes: str, images: int = 5) -> Path:
    for name in classes:
        (path / name).mkdir(parents=True)
        for number in range(images):
            (path / name / f"{number}.png").write_bytes(png(number))
    return path


def load(source: str, split: Split, **options: object) -> Source:
    return load_source(
        DataConfig(
            source=source, **{k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
        ),
        split,
    )


def keys(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source))]


class Fake:
    def __init__(self, labels: NDArray[np.int64] | None, size: int) -> None:
        self.labels, self.size = labels, size

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> Tensor:
        return torch.full((3, 2, 2), index, dtype=torch.uint8)

    def key(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return "fake"


def test_every_source_has_an_option_file_and_the_other_way_round() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(SOURCES)
    assert all(f"\nsource: {path.stem}\n" in path.read_text() for path in CONF.glob("*.yaml"))
    assert all(path.read_text().startswith("# ") for path in CONF.glob("*.yaml"))


def test_an_unknown_source_gets_the_closest_name() -> None:
    with pytest.raises(ValueError, match="unknown data source 'digit'; did you mean 'digits'"):
        load("digit", "train")


def test_digits_are_scikit_learns_split_in_writing_order() -> None:
    pixels, labels = load_digits(return_X_y=True)
    train, val = load("digits", "train"), load("digits", "val")
    assert (len(train), len(val)) == (1437, 360)
    assert train.labels is not None
    assert val.labels is not None
    assert np.array_equal(np.concatenate([train.labels, val.labels]), labels)
    image = val.image(5)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    expected = Image.fromarray((pixels[1442].reshape(8, 8) * 255 / 16).astype(np.float32)).resize(
        (32, 32), Image.Resampling.BILINEAR
    )
    assert np.abs(image.numpy() - np.asarray(expected)).max() <= 1
    assert val.key(5) == "digit-1442"
    assert train.fingerprint() != val.fingerprint()
    assert train.fingerprint() == load("digits", "train").fingerprint()


@pytest.mark.parametrize("source", ["tsv", "imagenet"])
def test_a_folder_of_tsv_files_gives_both_splits(tmp_path: Path, source: str) -> None:
    write_tsv(tmp_path / "train.tsv", 20)
    write_tsv(tmp_path / "val.tsv", 10)
    assert keys(load(source, "train", root=tmp_path)) == [f"train{i}" for i in range(20)]
    assert keys(load(source, "val", root=tmp_path, val_fraction=0.5)) == [
        f"val{i}" for i in range(10)
    ]
    other = write_tsv(tmp_path / "other" / "val.tsv", 5)
    for val_root in (other, other.parent):
        assert len(load(source, "val", root=tmp_path, val_root=val_root)) == 5
        assert len(load(source, "train", root=tmp_path / "train.tsv", val_root=val_root)) == 20


def test_a_folder_with_val_tsv_only_serves_validation(tmp_path: Path) -> None:
    write_tsv(tmp_path / "val.tsv", 10)
    assert len(load("tsv", "val", root=tmp_path)) == 10
    with pytest.raises(ValueError, match=r"no TSV file at .*train\.tsv; give the file itself"):
        load("tsv", "train", root=tmp_path)


@pytest.mark.parametrize("source", ["image_folder", "imagenet"])
def test_folders_train_and_val_give_both_splits(tmp_path: Path, source: str) -> None:
    write_folder(tmp_path / "train", "abc")
    write_folder(tmp_path / "val", "bc", 2)  # the label of b is 1 in both
    val = load(source, "val", root=tmp_path)
    assert len(load(source, "train", root=tmp_path)) == 15
    assert val.labels is not None
    assert val.labels.tolist() == [1, 1, 2, 2]
    other = write_folder(tmp_path / "other" / "val", "a", 3)
    for val_root in (other, other.parent):
        assert len(load(source, "val", root=tmp_path, val_root=val_root)) == 3


def test_one_folder_of_classes_is_for_training(tmp_path: Path) -> None:
    write_folder(tmp_path, "ab")
    assert len(load("image_folder", "train", root=tmp_path)) == 10
    assert len(load("image_folder", "val", root=tmp_path, val_fraction=0.2)) == 2
    assert len(load("image_folder", "train", root=tmp_path, val_fraction=0.2)) == 8


@pytest.mark.parametrize("source", ["tsv", "image_folder"])
def test_without_validation_images_the_options_are_named(tmp_path: Path, source: str) -> None:
    root = write_tsv(tmp_path / "a.tsv", 5) if source == "tsv" else write_folder(tmp_path, "ab")
    with pytest.raises(
        ValueError, match=r"no validation images in .* data.val_root=PATH.* data.val_fraction=0.2"
    ):
        load(source, "val", root=root)


@pytest.mark.parametrize("source", ["tsv", "image_folder"])
def test_an_absent_root_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match=r"needs data\.root=PATH"):
        load(source, "train")
    with pytest.raises(ValueError, match=r"data.root=.*absent does not exist"):
        load(source, "train", root=tmp_path / "absent")


def test_an_absent_val_root_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, "ab")
    with pytest.raises(ValueError, match=r"data.val_root=.*absent does not exist"):
        load("image_folder", "val", root=tmp_path, val_root=tmp_path / "absent")


@pytest.mark.parametrize(
    ("root", "found"),
    [(None, ""), ("", ""), ("absent", "no such folder"), ("empty", "nothing"), ("odd", "x.zip")],
)
def test_imagenet_that_is_not_there_says_what_to_set(
    tmp_path: Path, root: str | None, found: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "x.zip").touch()
    with pytest.raises(ValueError, match="SEED_DATA") as caught:
        load("imagenet", "train", root=tmp_path / root if root else root)
    message = str(caught.value)
    assert all(
        part in message for part in ("data.root=", "data=digits", "train.tsv", "train/", found)
    )
    assert "\n" not in message


@pytest.mark.parametrize("labelled", [True, False])
def test_held_out_images_and_the_rest_are_all_images_once(labelled: bool) -> None:
    labels = np.repeat(np.arange(4), [10, 50, 100, 41]) if labelled else None
    source = Fake(labels, 201)
    train, val = hold_out(source, 0.2, "train"), hold_out(source, 0.2, "val")
    assert sorted([*train.indices, *val.indices]) == list(range(201))
    if labelled:
        assert val.labels is not None
        assert np.bincount(val.labels).tolist() == [2, 10, 20, 8]
    else:
        assert (len(val), val.labels) == (40, None)
    assert np.array_equal(val.indices, hold_out(source, 0.2, "val").indices)
    assert not np.array_equal(val.indices, np.arange(len(val)))


def test_the_held_out_images_never_change() -> None:
    # Results of earlier runs stay comparable only while these images are the ones held out.
    assert hold_out(Fake(np.arange(20) % 2, 20), 0.2, "val").indices.tolist() == [0, 1, 14, 15]


def test_a_subset_passes_on_images_keys_and_labels() -> None:
    subset = Subset(Fake(np.arange(10) * 10, 10), np.array([7, 2]))
    assert subset.labels is not None
    assert (subset.labels.tolist(), keys(subset), int(subset.image(1)[0, 0, 0])) == (
        [70, 20],
        ["7", "2"],
        2,
    )
    assert subset.fingerprint() != Subset(Fake(None, 10), np.array([7, 3])).fingerprint()


@pytest.mark.parametrize(("fraction", "empty"), [(0.01, "validation"), (0.99, "training")])
def test_a_share_that_leaves_a_split_empty_is_refused(fraction: float, empty: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"data.val_fraction={fraction} of 9 images in 3 classes leaves no image for {empty}",
    ):
        hold_out(Fake(np.arange(9) % 3, 9), fraction, "val")
