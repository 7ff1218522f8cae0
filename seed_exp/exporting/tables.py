"""Files of features with the names of the images: Parquet, written part by part, and NumPy's npz."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.base.files import atomic_write
from seed_exp.base.registry import lookup
from seed_exp.data.sources import Source
from seed_exp.exporting.optional import optional


class Rows(NamedTuple):
    """Features of n images."""

    keys: list[str]
    """Names of the images."""
    labels: NDArray[np.int64]
    """Their classes; -1 = unlabelled."""
    features: dict[str, NDArray[Any]]
    """[n, D] by network, float32 or float16."""


def write_table(path: Path, rows: Iterable[Rows], metadata: dict[str, Any]) -> None:
    """Writes what `rows` yields, once or more, into one file, atomically; the ending of `path` says in which format.

    Parquet has a row for each image: `key`, `label` (null = unlabelled) and under each network's name the list of its numbers;
    `metadata` is JSON under `seed_exp` in the schema's metadata, and each element of `rows` is a row group. An npz file has
    arrays of the same names, `keys`, `labels` (-1 = unlabelled), and `metadata`; it is held in memory until it is written.

    Raises:
        ValueError: unknown ending; a library is missing.
    """
    write = lookup(TABLES, path.suffix, "format of features")
    with atomic_write(path) as file:
        write(file, rows, metadata)


def check_table(path: Path, names: Iterable[str]) -> None:
    """Raises at once what `write_table` would raise about `path` and the networks `names` when the first part has been made."""
    lookup(TABLES, path.suffix, "format of features")
    if taken := {"key", "label", "keys", "labels", "metadata", "file", "allow_pickle"} & set(names):
        raise ValueError(
            f"the file itself needs the name {taken.pop()}, as a network is called; rename the student's file"
        )
    if path.suffix == ".parquet":
        with optional(f"output={path}"):
            import pyarrow.parquet  # noqa: F401


def rows_of(
    source: Source, indices: NDArray[np.int64], features: Mapping[str, Tensor], *, half: bool
) -> Rows:
    """The rows of the images `indices` [n] of `source`, whose features [n, D] are given; `half` makes them float16."""
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
    """The name of an image as a text that can be written: what a file system calls a file need not be one."""
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
                # Random bits do not become smaller, and a dictionary of them would be larger.
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
