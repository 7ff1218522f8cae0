"""Where images come from: SOURCES by name, and how each splits training and validation images."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.base.registry import Registry, lookup
from seed_exp.config.schema import DataConfig, OnError
from seed_exp.data.detection_sets import load_coco, load_voc
from seed_exp.data.digits import DigitsSource
from seed_exp.data.hugging_face import Splits, hub_splits, parquet_splits
from seed_exp.data.image_folder import ImageFolderSource, class_names
from seed_exp.data.mask_sets import load_ade20k, load_mask_folder, load_voc_masks
from seed_exp.data.photos import PhotosSource
from seed_exp.data.shards import ShardsSource, find_shards
from seed_exp.data.subsets import images_named_in, share_of_each_class
from seed_exp.data.torchvision_sets import TorchvisionSource, has_splits
from seed_exp.data.tsv import TsvSource

Split = Literal["train", "val"]

_HOLD_OUT_SEED = 2101  # constant, so that every run holds out the same images


class Source(Protocol):
    """A fixed sequence of images, picklable, readable by several processes at once."""

    labels: NDArray[np.int64] | None
    """Class of each image [n], -1 for an unlabelled one; None when all are unlabelled."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def image(self, index: int) -> Tensor:
        """RGB pixels of image `index`, uint8 [3, H, W]; a ValueError names an unreadable image."""
        ...

    def encoded(self, index: int) -> bytes:
        """The file of image `index`, a PNG if it has none of its own; ValueError as `image`."""
        ...

    def key(self, index: int) -> str:
        """Name of image `index` for lists and errors."""
        ...

    def fingerprint(self) -> str:
        """A line that identifies the images, see `base.fingerprints`: the same for a copy."""
        ...


class NoValidationError(ValueError):
    """The source has training images only."""


class Subset:
    """The images `indices` [n] of another source, in that order."""

    def __init__(self, source: Source, indices: NDArray[np.int64]) -> None:
        self.source, self.indices = source, indices
        self.labels = (
            None if source.labels is None else np.asarray(source.labels[indices], np.int64)
        )

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Tensor:
        """Image `index` of the subset, uint8 [3, H, W]."""
        return self.source.image(int(self.indices[index]))

    def encoded(self, index: int) -> bytes:
        """The file of image `index` of the subset."""
        return self.source.encoded(int(self.indices[index]))

    def key(self, index: int) -> str:
        """Name of the image in the whole source."""
        return self.source.key(int(self.indices[index]))

    def fingerprint(self) -> str:
        """The whole source's fingerprint, with number and hash of the indices."""
        digest = hashlib.sha256(self.indices.tobytes()).hexdigest()
        return f"{self.source.fingerprint()}[{len(self)}:{digest[:16]}]"


def load_source(config: DataConfig, split: Split) -> Source:
    """The training or validation images of `config`.

    Validation images are, in this order of preference: those of `data.val_root`; those beside the
    training images (val.tsv, val/, the test split of a torchvision set); the share
    `data.val_fraction` of the training images, which `train` then lacks. `data.fraction` or
    `data.subset` may choose some of the remaining training images. A `~` at the beginning of a path
    is the home folder.

    With `data.on_error=skip`, rows that are broken beyond their image, such as lines of a TSV file
    without a label, count as unreadable images; otherwise they are errors at once.

    Raises:
        NoValidationError: there are no validation images; it is a ValueError too.
        ValueError: unknown source, images absent or unreadable; says which option to set.
    """
    config = dataclasses.replace(
        config,
        root=_home(config.root),
        val_root=_home(config.val_root),
        subset=_home(config.subset),
    )
    source = lookup(SOURCES, config.source, "data source")(config, split)
    if split == "train" and config.subset is not None:
        return Subset(source, images_named_in(Path(config.subset), source.key, len(source)))
    if split == "train" and config.fraction < 1:
        labels = np.zeros(len(source), np.int64) if source.labels is None else source.labels
        return Subset(
            source, share_of_each_class(labels, config.fraction, config.fraction_seed, at_least=1)
        )
    return source


def hold_out(source: Source, fraction: float, split: Split) -> Subset:
    """`val`: `fraction` of each class, or of all images if unlabelled; `train`: the rest.

    The choice is the same in every run.

    Raises:
        ValueError: one of the two would be empty.
    """
    labels = np.zeros(len(source), np.int64) if source.labels is None else source.labels
    val = share_of_each_class(labels, fraction, _HOLD_OUT_SEED)
    if not 0 < len(val) < len(source):
        raise ValueError(
            f"data.val_fraction={fraction} of {len(source)} images in {len(np.unique(labels))} "
            f"classes leaves no image for {'validation' if len(val) == 0 else 'training'}"
        )
    return Subset(source, val if split == "val" else np.setdiff1d(np.arange(len(source)), val))


def _digits(_config: DataConfig, split: Split) -> Source:
    return DigitsSource(split)


def _tsv(config: DataConfig, split: Split) -> Source:
    root = _root(config)
    val = _tsv_of(Path(config.val_root), "val") if config.val_root else root / "val.tsv"

    def load(path: Path) -> Source:
        return TsvSource(path, keep_bad=config.on_error is OnError.skip)

    return _choose(
        config,
        split,
        lambda: load(_tsv_of(root, "train")),
        (lambda: load(val)) if val.is_file() else None,
    )


def _tsv_of(path: Path, split: Split) -> Path:
    if path.is_dir():
        path = path / f"{split}.tsv"
    if not path.is_file():
        raise ValueError(
            f"no TSV file at {path}; give the file itself or a folder that holds {split}.tsv"
        )
    return path


def _shards(config: DataConfig, split: Split) -> Source:
    if not config.root:
        raise ValueError(f"data source {config.source!r} needs data.root=PATH")
    root = config.root
    val = _some_shards(config.val_root, "val") if config.val_root else []
    if not val and Path(root).is_dir():
        val = find_shards(root, "val")

    def load(paths: list[Path]) -> Source:
        return ShardsSource(paths, keep_bad=config.on_error is OnError.skip)

    return _choose(
        config,
        split,
        lambda: load(_some_shards(root, "train")),
        (lambda: load(val)) if val else None,
    )


def _some_shards(root: str, split: Split) -> list[Path]:
    found = find_shards(root, split)
    if not found:
        raise ValueError(
            f"no shards in {root}; expected {split}/*.tar or {split}-*.tar, "
            "or a pattern such as 'PATH/*.tar'"
        )
    return found


def _image_folder(config: DataConfig, split: Split) -> Source:
    root = _root(config)
    train = root / "train" if (root / "train").is_dir() else root
    val = root / "val"
    if config.val_root:
        given = _existing(config.val_root, "data.val_root")
        val = given / "val" if (given / "val").is_dir() else given

    def load_val() -> Source:
        # The training folder decides which label a class has.
        return ImageFolderSource(val, class_names(train))

    has_val = config.val_root or (train != root and val.is_dir())
    return _choose(config, split, lambda: ImageFolderSource(train), load_val if has_val else None)


def _mask_folder(config: DataConfig, split: Split) -> Source:
    root = _root(config)
    val_home = _existing(config.val_root, "data.val_root") if config.val_root else root

    def load(home: Path, part: str) -> Source:
        # Without folders for the splits, all images are training images.
        inside = part if (home / "images" / part).is_dir() else ""
        return load_mask_folder(home / "images" / inside, home / "masks" / inside, home)

    has_val = config.val_root or (root / "images" / "val").is_dir()
    if (root / "images" / "val").is_dir() and not (root / "images" / "train").is_dir():
        raise ValueError(
            f"{root / 'images'} has a folder val and none called train; give the training images "
            "images/train and masks/train"
        )
    return _choose(
        config,
        split,
        lambda: load(root, "train"),
        (lambda: load(val_home, "val")) if has_val else None,
    )


def _photos(config: DataConfig, split: Split) -> Source:
    root = _root(config)
    val = _existing(config.val_root, "data.val_root") if config.val_root else None
    return _choose(
        config,
        split,
        lambda: PhotosSource(root),
        None if val is None else lambda: PhotosSource(val),
    )


def _torchvision(config: DataConfig, split: Split) -> Source:
    split_known = has_splits(config.name)
    name, root = config.name or "", Path(config.root or "data")

    def load(part: Split | None) -> Source:
        return TorchvisionSource(name, root, part, config.download)

    if split_known:
        return load(split)
    return _choose(config, split, lambda: load(None), None)


def _of_splits(splits: Splits, config: DataConfig, split: Split) -> Source:
    return _choose(config, split, splits.train, splits.val)


def _imagenet(config: DataConfig, split: Split) -> Source:
    trial = (
        "set either to a folder with train.tsv and val.tsv, or with train/ and val/; "
        "data=photos data.root=FOLDER for a folder of photographs; data=digits for a trial"
    )
    if not config.root:
        raise ValueError(
            f"no images given: neither SEED_DATA (environment) nor data.root=PATH is set; {trial}"
        )
    root = Path(config.root)
    if root.is_file() or (root / "train.tsv").is_file():
        return _tsv(config, split)
    if (root / "train").is_dir():
        return _image_folder(config, split)
    found = (
        ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        if root.is_dir()
        else "no such folder"
    )
    raise ValueError(
        f"no ImageNet layout at SEED_DATA or data.root={root} (found: {found}); {trial}"
    )


_SOURCES: dict[str, Callable[[DataConfig, Split], Source]] = {
    "ade20k": lambda config, split: load_ade20k(_root(config), split),
    "coco": lambda config, split: load_coco(_root(config), split),
    "digits": _digits,
    "hf": lambda config, split: _of_splits(hub_splits(config), config, split),
    "image_folder": _image_folder,
    "imagenet": _imagenet,
    "mask_folder": _mask_folder,
    "parquet": lambda config, split: _of_splits(parquet_splits(config), config, split),
    "photos": _photos,
    "shards": _shards,
    "torchvision": _torchvision,
    "tsv": _tsv,
    "voc": lambda config, split: load_voc(_root(config), split),
    "voc_masks": lambda config, split: load_voc_masks(_root(config), split),
}
SOURCES: Registry[Callable[[DataConfig, Split], Source]] = Registry("SOURCES", _SOURCES)


def _choose(
    config: DataConfig, split: Split, train: Callable[[], Source], val: Callable[[], Source] | None
) -> Source:
    if val is not None:
        return train() if split == "train" else val()
    if config.val_fraction > 0:
        return hold_out(train(), config.val_fraction, split)
    if split == "val":
        place = config.root or config.name
        raise NoValidationError(
            f"data source {config.source!r} has no validation images in {place}; "
            "set data.val_root=PATH, or hold some out with data.val_fraction=0.2"
        )
    return train()


def _home(path: str | None) -> str | None:
    # A shell leaves the ~ of data.root=~/photos as it is.
    return None if path is None else os.path.expanduser(path)  # noqa: PTH111  (keeps patterns)


def _root(config: DataConfig) -> Path:
    if not config.root:
        raise ValueError(f"data source {config.source!r} needs data.root=PATH")
    return _existing(config.root, "data.root")


def _existing(path: str, option: str) -> Path:
    if not Path(path).exists():
        raise ValueError(f"{option}={path} does not exist")
    return Path(path)
