"""Labelled image sets of torchvision.datasets, by name."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets

from seed_exp.base.registry import lookup
from seed_exp.data.decode import encode_png, to_tensor
from seed_exp.data.fingerprints import PART_SIZE, middle_of, sample_hash, sizes_of

_SPLITS = {"train": ("train", "trainval", "train-standard"), "val": ("test", "val", "valid")}
_FILES = ("data", "samples", "_samples", "images", "_images", "_image_files")
_LABELS = ("targets", "labels", "_labels", "y")


class TorchvisionSource:
    """One split of a torchvision set; unlabelled unless its targets are one integer per image.

    Args:
        name: Class in torchvision.datasets.
        root: Folder where torchvision keeps its files.
        split: None for a set without splits. `val` is the set's test split or, if it has none, its
            validation split.
        download: Whether absent files are downloaded.

    Raises:
        ValueError: unknown name, files absent, the set has no such split, or it needs arguments
            that we do not have.
    """

    labels: NDArray[np.int64] | None

    def __init__(
        self, name: str, root: Path, split: Literal["train", "val"] | None, download: bool
    ) -> None:
        self.name, self.split = name, split
        self._set = _open(name, root, split, download)
        self.labels = _labels(self._set)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._set)

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W]."""
        try:
            return to_tensor(self._set[index][0])
        except Exception as error:  # from Pillow's readers or from the set itself
            raise ValueError(
                f"cannot read image {self.key(index)}: {error or type(error).__name__}"
            ) from error

    def encoded(self, index: int) -> bytes:
        """Image `index` as a PNG file: the file from which torchvision read it is not known."""
        return encode_png(self.image(index))

    def key(self, index: int) -> str:
        """Name of the set, split and number of the image."""
        return f"{self.name}-{self.split or 'all'}-{index}"

    def fingerprint(self) -> str:
        """Name, split, number of images, hash of labels, hash of the set's files or arrays.

        The last one is absent for the few sets in which we find neither.
        """
        if self._fingerprint is None:
            labels = b"" if self.labels is None else self.labels.tobytes()
            name = f"torchvision:{self.name}:{self.split or 'all'}:{len(self)}"
            self._fingerprint = f"{name}:{hashlib.sha256(labels).hexdigest()[:16]}"
            if content := _content(self._set):
                self._fingerprint += f"+{content}"
        return self._fingerprint


def has_splits(name: str | None) -> bool:
    """Whether the class `name` of torchvision.datasets takes the split to read as an argument.

    Raises:
        ValueError: no name, or torchvision has no such set (the closest name is given).
    """
    return bool({"train", "split"} & set(_parameters(name)))


def _parameters(name: str | None) -> dict[str, inspect.Parameter]:
    if name is None:
        raise ValueError(
            "data=torchvision needs the name of a class in torchvision.datasets, "
            "such as data.name=CIFAR10"
        )
    return dict(inspect.signature(lookup(_sets(), name, "torchvision dataset")).parameters)


def _sets() -> dict[str, Any]:
    return {
        name: getattr(datasets, name)
        for name in datasets.__all__
        if inspect.isclass(getattr(datasets, name))
    }


def _open(name: str, root: Path, split: str | None, download: bool) -> Any:
    parameters = _parameters(name)
    arguments = {
        key: value
        for key, value in {"root": root, "download": download}.items()
        if key in parameters
    }
    if split is None:
        choices: list[dict[str, Any]] = [{}]
    elif "train" in parameters:
        choices = [{"train": split == "train"}]
    else:
        choices = [{"split": value} for value in _SPLITS[split]]
    refused: list[str] = []
    for choice in choices:
        try:
            return _sets()[name](**arguments, **choice)
        except ValueError as error:  # torchvision's answer to a split that the set does not have
            refused.append(str(error))
        except (RuntimeError, OSError, ImportError, TypeError) as error:
            hint = (
                ""
                if download or "download" not in parameters
                else "; data.download=true downloads it"
            )
            raise ValueError(
                f"cannot open torchvision's {name} in {root}: {error}{hint}"
            ) from error
    raise ValueError(f"torchvision's {name} has no {split} split for us: {refused[0]}")


def _content(dataset: Any) -> str | None:
    """Hash of the files that the set reads, or of its images in memory; None if there are none."""
    num = len(dataset)
    if hasattr(getattr(dataset, "data", None), "shape") and len(dataset.data) == num > 0:
        return sample_hash(num, lambda index: np.asarray(dataset.data[index]).tobytes()[:PART_SIZE])
    files = next(filter(None, (_files(getattr(dataset, name, ()), num) for name in _FILES)), None)
    if files is None:
        return None
    return sample_hash(num, lambda index: middle_of(files[index]), sizes_of(files))


def _files(entries: Any, num: int) -> list[Path]:
    """`entries`, if they are the paths of `num` files or begin with these; else nothing."""
    paths = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
    if len(paths) != num or not all(isinstance(path, str | Path) for path in paths):
        return []
    return [Path(path) for path in paths] if paths and Path(paths[0]).is_file() else []


def _labels(dataset: Any) -> NDArray[np.int64] | None:
    known = [getattr(dataset, attribute) for attribute in _LABELS if hasattr(dataset, attribute)]
    targets = known[0] if known else [dataset[index][1] for index in range(len(dataset))]
    try:
        labels = np.asarray(targets)
    except (ValueError, TypeError, RuntimeError):  # boxes, captions: sequences of different lengths
        return None
    one_integer_each = labels.shape == (len(dataset),) and np.issubdtype(labels.dtype, np.integer)
    return labels.astype(np.int64) if one_integer_each else None
