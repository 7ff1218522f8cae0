"""Files of features with the names of their images: Parquet, written part by part, and npz."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.base.files import atomic_write
from seed_exp.base.optional import optional
from seed_exp.base.registry import lookup
from seed_exp.data.sources import Source


class Rows(NamedTuple):
    """Features of n images."""

    keys: list[str]
    """Names of the images."""
    labels: NDArray[np.int64]
    """Classes of the images [n]; -1 = unlabelled."""
    features: dict[str, NDArray[Any]]
    """Features by network [n, D], float32 or float16."""


def write_table(path: Path, rows: Iterable[Rows], metadata: dict[str, Any]) -> None:
    """Writes all `rows` into one file, atomically.

    A Parquet file has a row per image, with the columns `key`, `label` (null = unlabelled), and one
    per network, which holds the list of its features. The metadata of its schema holds `metadata`
    as JSON under `seed_exp`. Each element of `rows` becomes a row group.

    An npz file has the arrays `keys`, `labels` (-1 = unlabelled), `metadata` and one per network.
    It is held in memory until it is written.

    Args:
        path: File to write; its ending is the format.
        rows: Parts of the table, at least one.
        metadata: Facts about the features, as plain JSON.

    Raises:
        ValueError: the ending is unknown, or a library is missing.
    """
    write = lookup(TABLES, path.suffix, "format of features")
    with atomic_write(path) as file:
        write(file, rows, metadata)


def check_table(path: Path, names: Iterable[str]) -> None:
    """Raises ValueError if `write_table` could not write networks `names` to `path`.

    It is called before the first features are computed, so that a bad name costs no time.
    """
    lookup(TABLES, path.suffix, "format of features")
    if taken := {"key", "label", "keys", "labels", "metadata", "file", "allow_pickle"} & set(names):
        raise ValueError(
            f"the file itself needs the name {taken.pop()}, which a network has too; rename the "
            "student's file"
        )
    if path.suffix == ".parquet":
        with optional(f"output={path}"):
            import pyarrow.parquet  # noqa: F401


def rows_of(
    source: Source, indices: NDArray[np.int64], features: Mapping[str, Tensor], *, half: bool
) -> Rows:
    """Returns the rows of some images.

    Args:
        source: Source of the images.
        indices: Indices of the images in the source [n].
        features: Features of the images [n, D], by network.
        half: Whether to store the features as float16.
    """
    labels = (
        np.full(len(indices), -1)
        if source.labels is None
        else np.asarray(source.labels[indices], np.int64)
    )
    keys = [text_of(source.key(index)) for index in indices.tolist()]
    return Rows(
        keys,
        labels,
        {name: (rows.half() if half else rows).numpy() for name, rows in features.items()},
    )


def text_of(key: str) -> str:
    """Returns an image's name as valid text, which a name in a file system need not be."""
    return key.encode(errors="backslashreplace").decode()


def _write_parquet(file: BinaryIO, rows: Iterable[Rows], metadata: dict[str, Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    try:
        for keys, labels, features in rows:
            columns = {
                "key": pa.array(keys, pa.string()),
                "label": pa.array(labels, mask=labels < 0),
                **{
                    name: pa.FixedSizeListArray.from_arrays(
                        pa.array(values.reshape(-1)), values.shape[1]
                    )
                    for name, values in features.items()
                },
            }
            table = pa.table(columns, metadata={"seed_exp": json.dumps(metadata)})
            if writer is None:
                # Features hardly compress, and a dictionary of them would be larger than they are.
                writer = parquet.ParquetWriter(
                    file, table.schema, compression={"key": "zstd"}, use_dictionary=["label"]
                )
            if keys:
                writer.write_table(table, row_group_size=len(keys))
    finally:
        if writer is not None:
            writer.close()


def _write_npz(file: BinaryIO, rows: Iterable[Rows], metadata: dict[str, Any]) -> None:
    keys, labels, features = zip(*rows, strict=True)
    np.savez(
        file,
        keys=np.array([key for part in keys for key in part], np.str_),
        labels=np.concatenate(labels),
        metadata=np.array(json.dumps(metadata)),
        **{name: np.concatenate([part[name] for part in features]) for name in features[0]},  # type: ignore[arg-type]
    )


TABLES: dict[str, Callable[[BinaryIO, Iterable[Rows], dict[str, Any]], None]] = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
}
"""Functions that write a table, by the ending of the file."""
