"""Whatever bytes a TSV file or its index holds: rows, or an error that names the file."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from fuzzing import assert_ours, damaged, fuzz
from hypothesis import strategies as st
from PIL import Image

from seed_exp.data.tsv import TsvSource


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


ROWS = [
    b"key%d\t%d\t%s\n" % (number, number % 3, base64.b64encode(_png(number))) for number in range(4)
]
VALID = b"".join(ROWS)
STARTS = [len(b"".join(ROWS[:number])) for number in range(len(ROWS))]


def read_everything(path: Path) -> int:
    """The number of rows that could be read.

    Raises errors of other kinds than ours, and those that do not name the file.
    """
    try:
        source = TsvSource(path)
    except ValueError as error:
        assert_ours(error, path.name)
        return 0
    assert source.labels is None or len(source.labels) == len(source)
    assert source.fingerprint()
    good = 0
    for index in range(min(len(source), 20)):
        for read in (source.key, source.image):
            try:
                read(index)
                good += 1
            except ValueError as error:
                assert_ours(error, path.name)
    return good


@fuzz(60, content=st.binary(max_size=200) | st.text("\t\n\r0-a+=/", max_size=60).map(str.encode))
def test_any_bytes_are_rows_or_our_error(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "any.tsv"
        path.write_bytes(content)
        read_everything(path)


@fuzz(100, content=damaged(VALID))
def test_a_damaged_file_is_rows_or_our_error(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.tsv"
        path.write_bytes(content)
        read_everything(path)


@fuzz(
    60,
    lineidx=st.lists(
        st.sampled_from([*STARTS, len(VALID)]) | st.integers(-2, 2**70), max_size=6
    ).map(lambda starts: "\n".join(map(str, starts)).encode())
    | st.binary(max_size=30),
)
def test_a_wrong_line_index_is_used_where_it_fits_or_our_error(lineidx: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "indexed.tsv"
        path.write_bytes(VALID)
        path.with_suffix(".lineidx").write_bytes(lineidx)
        read_everything(path)


@fuzz(100, data=st.data())
def test_a_damaged_index_is_made_anew_or_our_error(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "indexed.tsv"
        path.write_bytes(VALID)
        os.utime(path, (1e9, 1e9))
        TsvSource(path)
        (index,) = path.parent.glob("*.npy")
        index.write_bytes(data.draw(damaged(index.read_bytes())))
        read_everything(path)


def test_the_whole_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "whole.tsv"
    path.write_bytes(VALID)
    assert read_everything(path) == 2 * len(ROWS)
