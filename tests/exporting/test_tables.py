"""Both formats give back what was written, whole or not at all."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seed_exp.exporting.tables import Rows, check_table, write_table


def parts(dtype: Any = np.float32) -> list[Rows]:
    values = np.random.default_rng(0).normal(size=(5, 4)).astype(dtype)
    keys = ["a/1.jpg", "b.png", "ü", "d", "e"]
    labels = np.array([3, -1, 0, 7, -1])
    whole = Rows(keys, labels, {"small": values, "large": np.tile(values, 2)})
    return [
        Rows(
            whole.keys[rows],
            whole.labels[rows],
            {name: array[rows] for name, array in whole.features.items()},
        )
        for rows in (slice(0, 3), slice(3, 3), slice(3, 5))
    ]


def whole(name: str, dtype: Any = np.float32) -> Any:
    return np.concatenate([part.features[name] for part in parts(dtype)])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_parquet_has_a_row_for_each_image_and_a_group_for_each_part(
    tmp_path: Path, dtype: Any
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_table(tmp_path / "f.parquet", iter(parts(dtype)), {"run": "x"})
    file = parquet.ParquetFile(tmp_path / "f.parquet")
    table = file.read()
    assert json.loads(table.schema.metadata[b"seed_exp"]) == {"run": "x"}
    assert table["key"].to_pylist() == ["a/1.jpg", "b.png", "ü", "d", "e"]
    assert table["label"].to_pylist() == [3, None, 0, 7, None]
    for name in ("small", "large"):
        read = np.array(table[name].to_pylist(), dtype)
        assert np.array_equal(read, whole(name, dtype))
        assert table.schema.field(name).type.value_type == (
            "float" if dtype is np.float32 else "halffloat"
        )
        assert table.schema.field(name).type.list_size == whole(name).shape[1]
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [
        3,
        2,
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_npz_needs_no_pickle(tmp_path: Path, dtype: Any) -> None:
    write_table(tmp_path / "f.npz", parts(dtype), {"run": "x"})
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert sorted(file) == ["keys", "labels", "large", "metadata", "small"]
        assert file["keys"].tolist() == ["a/1.jpg", "b.png", "ü", "d", "e"]
        assert file["labels"].tolist() == [3, -1, 0, 7, -1]
        assert np.array_equal(file["small"], whole("small", dtype))
        assert file["small"].dtype == dtype
        assert json.loads(str(file["metadata"])) == {"run": "x"}


@pytest.mark.parametrize("name", ["f.parquet", "f.npz"])
def test_what_fails_in_the_middle_leaves_the_file_of_before(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("before")

    def broken() -> Iterator[Rows]:
        yield parts()[0]
        raise ValueError("unplugged")

    with pytest.raises(ValueError, match="unplugged"):
        write_table(tmp_path / name, broken(), {})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "before")]


def test_an_unknown_ending_a_taken_name_or_a_missing_library_is_said_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"unknown format of features '\.csv'; .*\.npz, \.parquet"):
        check_table(Path("f.csv"), ["a"])
    with pytest.raises(ValueError, match="needs the name label"):
        check_table(Path("f.npz"), ["a", "label"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"output=f.parquet needs pyarrow.*pip install 'seed_exp\[export\]'"
    ):
        check_table(Path("f.parquet"), ["a"])
