"""TSV files and their index."""

from __future__ import annotations

import base64
import io
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from seed_exp.data import index as index_module
from seed_exp.data import tsv
from seed_exp.data.tsv import TsvSource


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int, label: int | str = 0, end: str = "\n") -> str:
    return f"image{number}\t{label}\t{base64.b64encode(png(number)).decode()}{end}"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def make(path: Path, rows: int) -> Path:
    return write(path, "".join(row(number % 256, number % 7) for number in range(rows)))


def index_of(path: Path) -> Path:
    return path.with_name(path.name + ".index.npy")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check(source: TsvSource, rows: int) -> None:
    assert len(source) == rows
    assert source.labels is not None
    assert source.labels.tolist() == [number % 7 for number in range(rows)]
    for number in {0, rows // 2, rows - 1}:
        assert source.key(number) == f"image{number % 256}"
        assert source.image(number)[:, 0, 0].tolist() == [number % 256, 0, 255 - number % 256]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", ["imagenet_samples", "cifar10_val"])
@pytest.mark.parametrize("with_lineidx", [False, True])
def test_real_files_give_their_rows(
    shared: Path, tmp_path: Path, name: str, with_lineidx: bool
) -> None:
    path = tmp_path / f"{name}.tsv"
    shutil.copy(shared / "data" / path.name, path)
    if with_lineidx:
        shutil.copy(shared / "data" / f"{name}.lineidx", tmp_path)
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    source = TsvSource(path)
    assert len(source) == len(rows)
    assert source.labels is not None
    assert source.labels.tolist() == [int(label) for _, label, _ in rows]
    for index in range(0, len(rows), 1 + len(rows) // 20):
        assert source.key(index) == rows[index][0]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(rows[index][2]))).convert("RGB"))
        assert (
            np.abs(
                source.image(index).permute(1, 2, 0).numpy().astype(int) - pixels.astype(int)
            ).max()
            <= 2
        )


def test_the_index_is_written_once_and_then_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a.tsv", 20)
    check(TsvSource(path), 20)
    assert names(tmp_path) == ["a.tsv", "a.tsv.index.npy"]
    monkeypatch.setattr(tsv, "_build_index", lambda path: pytest.fail("built again"))
    source = TsvSource(path)
    check(source, 20)
    assert isinstance(source._index.base, np.memmap)  # not a copy of its own in every process


def test_lines_are_found_whatever_the_size_of_the_pieces_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a.tsv", 20)
    expected = np.cumsum([0] + [len(line) for line in path.read_bytes().splitlines(keepends=True)])
    for size in (1, 7, 100, 1 << 20):
        monkeypatch.setattr(tsv, "_CHUNK_SIZE", size)
        assert np.array_equal(tsv._build_index(path)["offset"], expected[:-1])


def test_a_changed_file_is_indexed_again(tmp_path: Path) -> None:
    path = make(tmp_path / "a.tsv", 20)
    TsvSource(path)
    make(path, 30)
    check(TsvSource(path), 30)
    make(path, 30)
    os.utime(path, ns=(1, 1))  # same size, other time
    check(TsvSource(path), 30)
    assert np.load(index_of(path))[-1].tolist() == (path.stat().st_size, 1)


@pytest.mark.parametrize("keep", [0, 60, 200])
def test_a_short_index_is_built_again(tmp_path: Path, keep: int) -> None:
    path = make(tmp_path / "a.tsv", 20)
    TsvSource(path)
    index_of(path).write_bytes(index_of(path).read_bytes()[:keep])
    check(TsvSource(path), 20)


@pytest.mark.parametrize(
    "content", [np.zeros(3), np.zeros((3, 2), tsv._RECORD), np.zeros(1, tsv._RECORD)]
)
def test_an_array_that_is_no_index_is_built_again(
    tmp_path: Path, content: NDArray[np.void]
) -> None:
    path = make(tmp_path / "a.tsv", 20)
    np.save(index_of(path), content)
    check(TsvSource(path), 20)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: lines[:-4],  # short, as after two processes wrote it at once
        lambda lines: [],
        lambda lines: lines[1:],
        lambda lines: [lines[0], str(int(lines[1]) + 3), *lines[2:]],
        lambda lines: lines[::-1],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines, "999999999"],
        lambda lines: ["zero", *lines[1:]],
    ],
)
def test_a_lineidx_that_does_not_fit_is_not_believed(
    tmp_path: Path, spoil: Callable[[list[str]], list[str]]
) -> None:
    path = make(tmp_path / "a.tsv", 20)
    offsets = np.cumsum([0] + [len(line) for line in path.read_bytes().splitlines(keepends=True)])[
        :-1
    ]
    path.with_suffix(".lineidx").write_text(
        "".join(line + "\n" for line in spoil([str(offset) for offset in offsets]))
    )
    check(TsvSource(path), 20)


def test_a_lineidx_that_fits_saves_the_pass_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a.tsv", 20)
    offsets = np.cumsum([0] + [len(line) for line in path.read_bytes().splitlines(keepends=True)])[
        :-1
    ]
    path.with_suffix(".lineidx").write_text("".join(f"{offset}\n" for offset in offsets))
    line_starts, begins = tsv._line_starts, []
    monkeypatch.setattr(
        tsv,
        "_line_starts",
        lambda fd, begin, size: begins.append(begin) or line_starts(fd, begin, size),
    )
    check(TsvSource(path), 20)
    assert begins == [offsets[-1]]


def test_a_lineidx_that_leaves_a_line_out_is_found_at_the_latest_on_reading(tmp_path: Path) -> None:
    path = make(tmp_path / "a.tsv", 20)
    offsets = np.cumsum([0] + [len(line) for line in path.read_bytes().splitlines(keepends=True)])[
        :-1
    ]
    path.with_suffix(".lineidx").write_text(
        "".join(f"{offset}\n" for offset in np.delete(offsets, 5))
    )
    with pytest.raises(
        ValueError, match=r"line 5: .*leaves lines out; delete a.lineidx and a.tsv.index.npy"
    ):
        TsvSource(path).image(4)


def _load(path: Path, barrier: Barrier, results: Queue[tuple[int, str]]) -> None:
    barrier.wait()
    source = TsvSource(path)
    results.put((len(source), source.fingerprint()))


def test_processes_that_index_at_once_all_get_the_right_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    path = make(tmp_path / "a.tsv", 5000)
    expected = 5000, TsvSource(path).fingerprint()
    for _ in range(3):
        index_of(path).unlink()
        barrier, results = context.Barrier(4), context.Queue()
        processes = [context.Process(target=_load, args=(path, barrier, results)) for _ in range(4)]
        for process in processes:
            process.start()
        assert [results.get(timeout=30) for _ in processes] == [expected] * 4
        for process in processes:
            process.join()
    assert names(tmp_path) == ["a.tsv", "a.tsv.index.npy"]


def _refuse(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not bind root, under which tests may run.
    atomic_write = index_module.atomic_write

    def write(path: Path) -> AbstractContextManager[BinaryIO]:
        if any(folder in path.parents for folder in folders):
            raise PermissionError(13, "Permission denied")
        return atomic_write(path)

    monkeypatch.setattr(index_module, "atomic_write", write)


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    path = make(tmp_path / "data" / "a.tsv", 20)
    _refuse([path.parent], monkeypatch)
    check(TsvSource(path), 20)
    assert names(path.parent) == ["a.tsv"]
    monkeypatch.setattr(tsv, "_build_index", lambda path: pytest.fail("built again"))
    check(TsvSource(path), 20)


def test_where_nothing_can_be_written_each_process_keeps_its_own_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a.tsv", 20)
    _refuse([tmp_path, Path(os.environ["SEED_CACHE"])], monkeypatch)
    check(TsvSource(path), 20)


def test_a_pickled_source_opens_its_own_file(tmp_path: Path) -> None:
    source = TsvSource(make(tmp_path / "a.tsv", 2000))
    source.image(0)
    data = pickle.dumps(source)
    assert len(data) < 1000
    copy = pickle.loads(data)
    check(copy, 2000)
    assert copy._file.fileno() != source._file.fileno()


def _descriptor_after_fork(source: TsvSource, results: Queue[bool]) -> None:
    inherited = source._file
    source.image(1)
    results.put(source._file is not inherited)


def test_a_forked_process_opens_its_own_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    source = TsvSource(make(tmp_path / "a.tsv", 5))
    source.image(0)
    before = source._file
    results = context.Queue()
    process = context.Process(target=_descriptor_after_fork, args=(source, results))
    process.start()
    assert results.get(timeout=30)
    process.join()
    source.image(1)
    assert source._file is before


def test_windows_line_ends_and_a_missing_last_one_are_read(tmp_path: Path) -> None:
    text = row(0, 0, "\r\n") + row(1, 1, "\r\n") + row(2, 2, "")
    check(TsvSource(write(tmp_path / "a.tsv", text)), 3)


def test_keys_may_be_long(tmp_path: Path) -> None:
    key = "k" * 3000
    source = TsvSource(write(tmp_path / "a.tsv", row(0) + row(1).replace("image1", key)))
    assert source.key(1) == key
    assert source.image(1)[0, 0, 0] == 1


def test_labels_of_minus_one_mean_unlabelled(tmp_path: Path) -> None:
    assert TsvSource(write(tmp_path / "a.tsv", row(0, -1) + row(1, -1))).labels is None
    labels = TsvSource(write(tmp_path / "b.tsv", row(0, -1) + row(1, 3))).labels
    assert labels is not None
    assert labels.tolist() == [-1, 3]


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    first, copy = make(tmp_path / "x" / "a.tsv", 20), make(tmp_path / "y" / "a.tsv", 20)
    assert TsvSource(first).fingerprint() == TsvSource(copy).fingerprint()
    assert TsvSource(first).fingerprint().startswith("tsv:a.tsv:20:")
    other = write(copy, first.read_text().replace("\t3\t", "\t4\t"))
    assert TsvSource(first).fingerprint() != TsvSource(other).fingerprint()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.tsv is empty"),
        (row(0) + "image1\t5\n", r"a.tsv, line 2: expected 3 columns .* got 2"),
        (row(0) + "\n", r"a.tsv, line 2: expected 3 columns .* got an empty line"),
        (row(0) + "\r\n" + row(1), r"a.tsv, line 2: expected 3 columns .* got an empty line"),
        ("x" * 100_000, r"a.tsv, line 1: expected 3 columns .* got 1"),
        (
            row(0) + row(1) + row(2, "cat"),
            r"a.tsv, line 3: the label must be an integer, .* got b'cat'",
        ),
        (row(0) + row(1, 1.5), r"a.tsv, line 2: the label must be an integer, .* got b'1.5'"),
        (row(0, 2**70), r"a.tsv, line 1: the label must be an integer"),
        (row(0, 2**31), r"a.tsv, line 1: the label must be an integer"),
        (
            row(0) + row(1, -2),
            r"a.tsv, line 2: the label must be an integer, .* -1 for none, got b'-2'",
        ),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TsvSource(write(tmp_path / "a.tsv", text))
    with pytest.raises(ValueError, match=message):  # with the index that there may be now
        TsvSource(tmp_path / "a.tsv")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("image1\t1\tAA*AA\n", r"a.tsv, line 2: the image 'image1' is not valid base64"),
        ("image1\t1\tAAAAA\n", r"a.tsv, line 2: the image 'image1' is not valid base64"),
        ("image1\t1\tAAAA\textra\n", r"a.tsv, line 2: expected 3 columns .* got 4"),
        ("image1\t1\tAAAA\n", r"cannot decode image 'image1 \(.*a.tsv, line 2\)'"),
        ("image1\t1\t\n", r"cannot decode image 'image1 .*the file is empty"),
    ],
)
def test_a_malformed_image_is_named_with_its_line(tmp_path: Path, bad: str, message: str) -> None:
    source = TsvSource(write(tmp_path / "a.tsv", row(0) + bad + row(2)))
    source.image(2)
    with pytest.raises(ValueError, match=message):
        source.image(1)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no TSV file at .*a.tsv"):
        TsvSource(tmp_path / "a.tsv")


def test_a_file_that_grows_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a.tsv", 5)
    read_head = tsv._read_head

    def grow(*arguments: object) -> tuple[str, int]:
        with path.open("a") as file:
            file.write(row(1))
        return read_head(*arguments)

    monkeypatch.setattr(tsv, "_read_head", grow)
    with pytest.raises(ValueError, match="changed while"):
        TsvSource(path)


BAD_ROWS = {
    "cut in the middle": row(1)[: len(row(1)) // 2] + "\n",
    "cut, the next one joined to it": row(1)[: len(row(1)) // 2],
    "no label": "image1\tAAAA\n",
    "a column more": row(1).replace("\n", "\textra\n"),
    "empty": "\n",
    "label of another kind": row(1, "cat"),
    "label out of range": row(1, -7),
    "no base64": "image1\t1\tAA*AA\n",
    "base64 of no image": "image1\t1\tAAAA\n",
    "image cut": "image1\t1\t" + base64.b64encode(png(1)[:-40]).decode() + "\n",
    "zeros": "\0" * 50 + "\n",
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_that_may_be_kept_cost_only_themselves(tmp_path: Path, kind: str) -> None:
    source = TsvSource(
        write(tmp_path / "a.tsv", row(0, 4) + BAD_ROWS[kind] + row(2, 5) + row(3, 6)), keep_bad=True
    )
    num_lost = 2 if "joined" in kind else 1
    assert len(source) == 5 - num_lost
    for number in range(1 + num_lost, 4):
        assert source.image(number - num_lost + 1)[0, 0, 0] == number
    with pytest.raises(ValueError, match=r"a.tsv, line 2"):
        source.image(1)
    assert source.labels is not None
    assert (source.labels >= 0).all()  # evaluation wants labels from 0 on
    assert source.labels[[0, -1]].tolist() == [4, 6]
    source.key(1)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.labels.tolist() == source.labels.tolist()


def test_a_row_without_a_label_has_that_of_the_image_that_replaces_it(tmp_path: Path) -> None:
    text = row(0, 4) + row(1, "cat") + row(2, "dog") + row(3, 6) + row(4, "")
    source = TsvSource(write(tmp_path / "a.tsv", text), keep_bad=True)
    assert source.labels is not None
    assert source.labels.tolist() == [4, 6, 6, 6, 4]


def test_a_file_of_bad_rows_only_is_refused_also_where_bad_rows_may_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.tsv, line 1: expected 3 columns .* got 2"):
        TsvSource(write(tmp_path / "a.tsv", "a.jpg\tAAAA\nb.jpg\tAAAA\n"), keep_bad=True)


def test_a_byte_order_mark_is_no_part_of_the_key(tmp_path: Path) -> None:
    source = TsvSource(write(tmp_path / "a.tsv", "\ufeff" + row(0) + row(1)))
    assert source.key(0) == "image0"
    assert source.image(0)[0, 0, 0] == 0


@pytest.mark.parametrize(
    "change", [lambda text: text[:-30], lambda text: "x" + text, lambda text: row(7, 5) * 2]
)
def test_a_file_that_changes_while_it_is_read_is_named(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    path = write(tmp_path / "a.tsv", row(0) + row(1))
    source = TsvSource(path)
    source.image(1)
    write(path, change(path.read_text()))
    with pytest.raises(
        ValueError, match=r"a.tsv, line 2: .*; the file changed since it was indexed, start again"
    ):
        source.image(1)


def test_a_touched_file_is_still_read(tmp_path: Path) -> None:
    source = TsvSource(make(tmp_path / "a.tsv", 3))
    os.utime(source.path)
    check(source, 3)


def test_encoded_gives_the_file_as_it_is(tmp_path: Path) -> None:
    assert TsvSource(make(tmp_path / "a.tsv", 3)).encoded(2) == png(2)


PIECES = st.sampled_from(
    [
        b"\t",
        b"\n",
        b"\r\n",
        b"1",
        b"-1",
        b"99999999999999999999",
        b"AAAA",
        b"\xef\xbb\xbf",
        b"\0",
        b"\xff",
        row(1).encode(),
    ]
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.one_of(PIECES, st.binary(max_size=6)), max_size=12), st.booleans())
def test_whatever_bytes_there_are_only_our_own_errors_come_out(
    tmp_path: Path, pieces: list[bytes], keep_bad: bool
) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"".join(pieces))
    index_of(path).unlink(missing_ok=True)
    try:
        source = TsvSource(path, keep_bad)
    except ValueError as error:
        message = str(error)
    else:
        message = "a.tsv"
        assert len(source) == len(path.read_bytes().removesuffix(b"\n").split(b"\n"))
        for number in range(len(source)):
            source.key(number)
            with suppress(ValueError):
                assert source.image(number).shape == (3, 4, 5)
    assert "a.tsv" in message
