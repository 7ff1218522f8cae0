"""Data sets of Hugging Face, and parquet files, which the same library reads.

https://github.com/huggingface/datasets
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.base.optional import optional
from seed_exp.base.registry import closest
from seed_exp.config.schema import DataConfig
from seed_exp.data.decode import decode
from seed_exp.data.fingerprints import middle, sample_hash
from seed_exp.data.hf_columns import choose_image_column, choose_label_column, labels_of

_TRAIN = ("train",)
_VAL = ("validation", "valid", "val", "dev", "test")
"""Names of splits, the preferred one first."""
_BATCH_SIZE = 10_000  # rows whose sizes are looked up at once


class HuggingFaceSource:
    """Images of one split of a data set, which the library keeps in memory-mapped Arrow files.

    Rows are read on demand and in any order. Instances may be forked or pickled into other
    processes, which map the same files.

    Args:
        kind: First word of the fingerprint.
        name: Name of the data set, for errors.
        split: Name of the split.
        rows: The split, a `datasets.Dataset`.
        image_column: Column of the images; None = the only one that can be.
        label_column: Column of the labels; None = the only one that can be, if there is one.
        folders: Folders in which a row may name an image file instead of holding it.

    Raises:
        ValueError: the columns do not exist, are not of these kinds, or several can be meant.
            Reading an image raises it for a row without one, and for a file elsewhere.
    """

    labels: NDArray[np.int64] | None

    def __init__(
        self,
        kind: str,
        name: str,
        split: str,
        rows: Any,
        image_column: str | None,
        label_column: str | None,
        folders: list[Path],
    ) -> None:
        self._kind, self._name, self._split, self._folders = kind, name, split, folders
        self._column = choose_image_column(name, rows.features, image_column)
        label = choose_label_column(name, rows.features, label_column)
        self.classes = None if label is None else getattr(rows.features[label], "names", None)
        """Names of the classes by label, if the data set has them."""
        self.labels = None if label is None else labels_of(name, rows, label)
        # As Arrow, because the library's own format would decode the image.
        self._rows = rows.select_columns([self._column]).with_format("arrow")
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Tensor:
        """Image `index`, uint8 [3, H, W]."""
        return decode(self.encoded(index), f"{self.key(index)} ({self._name})")

    def encoded(self, index: int) -> bytes:
        """The file of image `index`."""
        value = self._rows[index].column(self._column)[0].as_py()
        data, path = _parts(value)
        if data is None and path is not None:
            return self._read(index, path)
        if data is None:
            raise ValueError(f"{self._named(index)}: no image, the value is null")
        return bytes(data)

    def key(self, index: int) -> str:
        """Split and number of the image; names in data sets may be absent or occur twice."""
        return f"{self._split}-{index}"

    def fingerprint(self) -> str:
        """Split, number of images, hash of labels, hash of sizes and of some images' bytes."""
        if self._fingerprint is None:
            labels = b"" if self.labels is None else self.labels.astype("<i8").tobytes()
            digest = hashlib.sha256(labels).hexdigest()[:16]
            content = sample_hash(len(self), self._middle, np.concatenate([*self._sizes()]))
            self._fingerprint = f"{self._kind}:{self._split}:{len(self)}:{digest}+{content}"
        return self._fingerprint

    def _sizes(self) -> Iterator[NDArray[np.int64]]:
        """Sizes in bytes of the images that rows hold; -1 where a row names a file or nothing."""
        import pyarrow as pa
        import pyarrow.compute as pc

        yield np.empty(0, np.int64)
        for batch in self._rows.iter(_BATCH_SIZE):
            values = batch.column(self._column)
            if pa.types.is_struct(values.type):
                values = pc.struct_field(values, "bytes")
            sizes = pc.fill_null(pc.cast(pc.binary_length(values), "int64"), -1)
            yield sizes.to_numpy().astype(np.int64)

    def _middle(self, index: int) -> bytes:
        """The part of image `index` that counts for the fingerprint; empty if it has none."""
        try:
            data = self.encoded(index)
        except ValueError:
            return b""
        start, length = middle(0, len(data))
        return data[start : start + length]

    def _read(self, index: int, path: str) -> bytes:
        # A data set is of others: it must not name any file of this machine.
        place = Path(os.path.abspath(path))  # noqa: PTH100  (links in the hub's cache lead out)
        if not any(place.is_relative_to(folder) for folder in self._folders):
            raise ValueError(
                f"{self._named(index)}: names the file {path}, which is neither in data.root nor "
                "in the cache of Hugging Face; keep images in the data set itself"
            )
        try:
            return place.read_bytes()
        except OSError as error:
            raise ValueError(
                f"{self._named(index)}: cannot read {path}: {error.strerror}"
            ) from error

    def _named(self, index: int) -> str:
        return f"cannot read image {self.key(index)!r} of {self._name}"


class Splits(NamedTuple):
    """The sources of a data set."""

    train: Callable[[], HuggingFaceSource]
    val: Callable[[], HuggingFaceSource] | None
    """None = the data set has no split for validation."""


def hub_splits(config: DataConfig) -> Splits:
    """Training and validation images of a data set on the hub, in the cache, or in a folder.

    Raises:
        ValueError: neither a name nor a folder, or both; the data set cannot be had; unknown split.
    """
    if (config.root is None) == (config.name is None):
        raise ValueError(
            "data=hf needs either data.name=OWNER/NAME, a data set of the Hugging Face hub or its "
            f"cache, or data.root=FOLDER; got data.name={config.name} and data.root={config.root}"
        )
    place = config.root or config.name
    return _splits(config, lambda root: _load_hub(config, root or str(config.name)), str(place))


def parquet_splits(config: DataConfig) -> Splits:
    """Training and validation images of parquet files: a file, a pattern, or a folder of them.

    Raises:
        ValueError: no such files, no parquet files, or unknown split.
    """
    if config.root is None:
        raise ValueError(
            "data source 'parquet' needs data.root=PATH: a file, a folder or 'A*.parquet'"
        )
    return _splits(config, lambda root: _load_parquet(str(root)), config.root)


def _splits(
    config: DataConfig, load: Callable[[str | None], Mapping[str, Any]], name: str
) -> Splits:
    with optional(f"data={config.source}", "hf"):
        import datasets  # noqa: F401
    found = load(config.root)
    train = _known(name, found, config.train_split, "train_split") or _first(_TRAIN, found)
    if train is None and len(found) == 1:
        (train,) = found
    val = _known(name, found, config.val_split, "val_split")
    val = val or _first([one for one in _VAL if one != train], found)

    def source(rows: Mapping[str, Any], split: str) -> HuggingFaceSource:
        return HuggingFaceSource(
            config.source,
            name,
            split,
            rows[split],
            config.image_column,
            config.label_column,
            [] if config.source == "parquet" else _own_folders(config),
        )

    def training() -> HuggingFaceSource:
        if train is None:
            raise ValueError(
                f"{name} has no split 'train', but {', '.join(found)}; give data.train_split=SPLIT"
            )
        return source(found, train)

    def elsewhere() -> HuggingFaceSource:
        others = load(config.val_root)
        split = config.val_split or _first([*_VAL, *_TRAIN], others) or next(iter(others))
        given = source(others, split)
        _check_classes(name, training().classes, str(config.val_root), given.classes)
        return given

    if config.val_root is not None:
        return Splits(training, elsewhere)
    return Splits(training, None if val is None else lambda: source(found, val))


def _load_hub(config: DataConfig, place: str) -> Mapping[str, Any]:
    """The splits of a data set by name; scripts of a data set are not run, its files are read."""
    import datasets

    folder = Path(place)
    if config.root is not None and not folder.is_dir():
        raise ValueError(f"no folder of a Hugging Face data set at {place}")
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return _had(
        place,
        lambda: (
            datasets.load_from_disk(os.path.abspath(place))  # noqa: PTH100
            if saved
            else datasets.load_dataset(place, config.config)
        ),
    )


def _load_parquet(root: str) -> Mapping[str, Any]:
    import datasets

    place = os.path.abspath(root)  # noqa: PTH100  (may be a pattern)
    if not Path(place).is_dir():
        return _had(root, lambda: datasets.load_dataset("parquet", data_files=place))
    # As a folder of any files it leaves out those of other kinds, a README for example.
    found = _had(root, lambda: datasets.load_dataset(place))
    kinds = {rows.builder_name for rows in found.values()}
    if kinds != {"parquet"}:
        raise ValueError(
            f"the folder {root} holds files of the kind {kinds.pop()} rather than parquet files; "
            "data=hf reads it, or give a pattern: data.root='FOLDER/*.parquet'"
        )
    return found


def _had(name: str, load: Callable[[], Any]) -> Mapping[str, Any]:
    """The splits that `load` gives.

    Raises:
        ValueError: it raised anything else than what ends a program.
    """
    import datasets

    try:
        loaded = load()
    # Errors of HTTP, of Arrow, of file systems, of the hub, of each builder.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load the data set {name}: {reason}") from error
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    return dict(loaded)


def _known(name: str, splits: Mapping[str, Any], split: str | None, option: str) -> str | None:
    if split is not None and split not in splits:
        raise ValueError(
            f"data.{option}={split}: {name} has no such split; {closest(split, splits)}"
        )
    return split


def _first(names: Iterable[str], splits: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in splits), None)


def _own_folders(config: DataConfig) -> list[Path]:
    """The folders whose files a data set may name: its own, and the caches of Hugging Face."""
    from datasets import config as places
    from huggingface_hub import constants

    given = [root for root in (config.root, config.val_root) if root is not None]
    caches = (places.HF_CACHE_HOME, places.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return [Path(os.path.abspath(place)) for place in (*given, *caches)]  # noqa: PTH100


def _parts(value: Any) -> tuple[bytes | None, str | None]:
    """File and path of a value of an image column."""
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return value, None


def _check_classes(
    name: str, classes: list[str] | None, other: str, others: list[str] | None
) -> None:
    if classes is not None and others is not None and classes != others:
        raise ValueError(
            f"the classes of {other} ({', '.join(others[:5])} ...) are not those of {name} "
            f"({', '.join(classes[:5])} ...), so their labels differ"
        )
