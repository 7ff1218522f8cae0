"""Sets of torchvision.datasets, on files that the tests write."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from seed_exp.config.schema import DataConfig
from seed_exp.data.sources import Split, load_source
from seed_exp.data.torchvision_sets import TorchvisionSource


def write_mnist(root: Path, name: str = "MNIST") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    content = {}
    for part, size in (("train", 12), ("t10k", 5)):
        images = np.random.default_rng(size).integers(0, 256, (size, 28, 28), np.uint8)
        labels = np.arange(size, dtype=np.uint8) % 10
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, size, 28, 28) + images.tobytes()
        )
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, size) + labels.tobytes()
        )
        content[part] = images, labels
    return content


def config(name: str | None, root: Path, **options: float) -> DataConfig:
    return DataConfig(source="torchvision", name=name, root=str(root), **options)


@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("val", "t10k")])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_a_set_with_train_true_or_false_gives_its_splits(
    tmp_path: Path, name: str, split: Split, part: str
) -> None:
    images, labels = write_mnist(tmp_path, name)[part]
    source = load_source(config(name, tmp_path), split)
    assert source.labels is not None
    assert source.labels.tolist() == labels.tolist()
    for index in range(len(source)):
        assert np.array_equal(source.image(index).numpy(), np.repeat(images[index][None], 3, 0))
    assert source.key(2) == f"{name}-{split}-2"
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.image(3), source.image(3))
    assert copy.fingerprint() == source.fingerprint()


def write_imagenette(root: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for wnid in ("n01440764", "n02102040"):
            folder = root / "imagenette2" / split / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (9, 8), (number, 0, 0)).save(folder / f"{number}.JPEG")


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("val", 4)])
def test_a_set_with_named_splits_gives_the_one_it_has(
    tmp_path: Path, split: Split, count: int
) -> None:
    write_imagenette(tmp_path)  # has splits train and val, no test; labels only through its images
    source = load_source(config("Imagenette", tmp_path), split)
    assert source.labels is not None
    assert source.labels.tolist() == sorted([0, 1] * (count // 2))
    assert source.image(0).shape == (3, 8, 9)


FAKE = (1000, (3, 8, 8), 10, None, None, 0)
"""Defaults of `FakeData`, but for the size of an image."""


def test_a_set_without_splits_is_held_out_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every label is drawn with the image, which is 1000 x 224 x 224 pixels by default.
    monkeypatch.setattr(datasets.FakeData.__init__, "__defaults__", FAKE)
    train = load_source(config("FakeData", tmp_path, val_fraction=0.1), "train")
    val = load_source(config("FakeData", tmp_path, val_fraction=0.1), "val")
    assert len(train) + len(val) == 1000
    assert len(load_source(config("FakeData", tmp_path), "train")) == 1000
    assert set(train.labels) == set(val.labels) == set(range(10))
    with pytest.raises(ValueError, match=r"data\.val_fraction=0\.2"):
        load_source(config("FakeData", tmp_path), "val")


def test_targets_that_are_no_classes_make_a_set_unlabelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Boxes:
        def __init__(self, root: Path) -> None:
            self.targets = [[1.0, 2.0], [3.0]]

        def __len__(self) -> int:
            return 2

    monkeypatch.setattr(datasets, "FakeData", Boxes)
    assert TorchvisionSource("FakeData", tmp_path, None, False).labels is None
    monkeypatch.setattr(Boxes, "__init__", lambda self, root: setattr(self, "targets", [0.5, 1.5]))
    assert TorchvisionSource("FakeData", tmp_path, None, False).labels is None


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    write_imagenette(tmp_path)
    source = load_source(config("Imagenette", tmp_path), "val")
    (tmp_path / "imagenette2" / "val" / "n02102040" / "1.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read image Imagenette-val-3"):
        source.image(3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "needs the name of a class in torchvision.datasets, such as data.name=CIFAR10"),
        ("CIFAR1O", "unknown torchvision dataset 'CIFAR1O'; did you mean 'CIFAR10'"),
        ("CIFAR10", "cannot open torchvision's CIFAR10 in .*data.download=true downloads it"),
        ("DTD", "cannot open torchvision's DTD in .*data.download=true downloads it"),
        ("EMNIST", "torchvision's EMNIST has no train split for us: Unknown value 'train'"),
        ("CocoCaptions", "cannot open torchvision's CocoCaptions in .*annFile"),
    ],
)
def test_a_set_that_cannot_be_opened_says_why(
    tmp_path: Path, name: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_source(config(name, tmp_path), "train")
    assert not list(tmp_path.iterdir())
