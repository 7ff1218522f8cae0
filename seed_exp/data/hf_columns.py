"""The columns of a Hugging Face data set that hold images and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seed_exp.base.registry import closest
from seed_exp.data.index import check_labels

_LABELS = ("label", "labels", "target", "targets", "class", "y")
"""Names of columns of whole numbers that are labels."""


def choose_image_column(name: str, features: Mapping[str, Any], wanted: str | None) -> str:
    """The column of the images.

    Args:
        name: Name of the data set, for errors.
        features: Types of the columns by name.
        wanted: The column to take; None = the only one that can be.

    Raises:
        ValueError: there is no such column, it holds no image files, or several can be meant.
    """
    from datasets import Image

    if wanted is not None and wanted not in features:
        raise ValueError(
            f"data.image_column={wanted}: {name} has no such column; {closest(wanted, features)}"
        )
    could_be = [column for column, kind in features.items() if _holds_files(kind)]
    images = [column for column in could_be if isinstance(features[column], Image)]
    chosen = [wanted] if wanted in could_be else []
    chosen = chosen if wanted is not None else images or could_be
    if len(chosen) == 1:
        return chosen[0]
    if len(chosen) > 1:
        raise ValueError(
            f"{name} has several columns of images: {', '.join(chosen)}; "
            "give data.image_column=COLUMN"
        )
    what = "no column that is" if wanted is None else f"data.image_column={wanted}, which is not"
    raise ValueError(
        f"{name} has {what} an image: an Image of Hugging Face, or the bytes of image files; "
        f"its columns: {_described(features)}"
    )


def _holds_files(kind: Any) -> bool:
    """Whether values of this type are files: an Image, bytes, or a structure with `bytes`."""
    from datasets import Image, Value

    if isinstance(kind, dict):
        kind = kind.get("bytes")
    return isinstance(kind, Image) or (
        isinstance(kind, Value) and kind.dtype in ("binary", "large_binary")
    )


def choose_label_column(name: str, features: Mapping[str, Any], wanted: str | None) -> str | None:
    """The column of the labels, None if there is none; otherwise as `choose_image_column`."""
    from datasets import ClassLabel

    if wanted is not None and wanted not in features:
        raise ValueError(
            f"data.label_column={wanted}: {name} has no such column; {closest(wanted, features)}"
        )
    could_be = [column for column, kind in features.items() if _is_whole_number(kind)]
    if wanted is not None:
        if wanted in could_be:
            return wanted
        raise ValueError(
            f"{name} has data.label_column={wanted}, which is no ClassLabel and no column of "
            f"whole numbers; its columns: {_described(features)}"
        )
    classes = [column for column in could_be if isinstance(features[column], ClassLabel)]
    chosen = classes or [column for column in could_be if column.lower() in _LABELS]
    if len(chosen) > 1:
        raise ValueError(
            f"{name} has several columns of labels: {', '.join(chosen)}; "
            "give data.label_column=COLUMN"
        )
    return chosen[0] if chosen else None


def _is_whole_number(kind: Any) -> bool:
    from datasets import ClassLabel, Value

    return isinstance(kind, ClassLabel) or (
        isinstance(kind, Value) and kind.dtype.lstrip("u").startswith("int")
    )


def _described(features: Mapping[str, Any]) -> str:
    from datasets import Value

    return ", ".join(
        f"{column} ({kind.dtype if isinstance(kind, Value) else type(kind).__name__})"
        for column, kind in features.items()
    )


def labels_of(name: str, rows: Any, column: str) -> NDArray[np.int64] | None:
    """Labels [n], -1 where a row has none; None if none has one.

    Raises:
        ValueError: a value is not the number of a class.
    """
    import pyarrow.compute as pc

    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    labels = pc.fill_null(pc.cast(values, "int64"), -1).to_numpy().astype(np.int64)
    return check_labels(labels, f"column {column} of {name}")
