"""Tar shards and their index."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import multiprocessing
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from seed_exp.config.schema import DataConfig, OnError
from seed_exp.data import shards
from seed_exp.data.shards import ShardsSource, find_shards, member_name
from seed_exp.data.sources import Source, Split, load_source


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def archive(members: dict[str, bytes], format_: int = tarfile.PAX_FORMAT, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format_) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def samples(first: int, num: int) -> dict[str, bytes]:
    out = {}
    for number in range(first, first + num):
        out |= {
            f"{number:06d}.png": png(number),
            f"{number:06d}.cls": str(number % 7).encode(),
            f"{number:06d}.json": b"{}",
        }
    return out


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make(folder: Path, sizes: tuple[int, ...] = (4, 1, 5), name: str = "train") -> list[Path]:
    starts = np.cumsum((0, *sizes)).tolist()
    return [
        write(folder / f"{name}-{number:06d}.tar", archive(samples(starts[number], size)))
        for number, size in enumerate(sizes)
    ]


def check(source: Source, num: int) -> None:
    assert len(source) == num
    assert source.labels is not None
    assert source.labels.tolist() == [number % 7 for number in range(num)]
    for number in [*range(num), 0]:
        assert source.key(number) == f"{number:06d}.png"
        assert source.image(number)[:, 0, 0].tolist() == [number, 0, 255 - number]
        assert source.encoded(number) == png(number)


def load(root: Path | str, split: Split = "train", **options: object) -> Source:
    return load_source(DataConfig(source="shards", root=str(root), **options), split)


def keys(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source))]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_of_all_shards_are_one_sequence(tmp_path: Path, format_: int) -> None:
    paths = make(tmp_path)
    paths.append(write(tmp_path / "train-000003.tar", archive(samples(10, 2), format_)))
    check(ShardsSource(paths), 12)


def test_the_index_is_made_once_mapped_and_made_again_for_a_changed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make(tmp_path)
    check(ShardsSource(paths), 10)
    build = shards._build_index
    built: list[Path] = []
    monkeypatch.setattr(shards, "_build_index", lambda path: built.append(path) or build(path))
    source = ShardsSource(paths)
    check(source, 10)
    assert built == []
    assert all(isinstance(index.base, np.memmap) for index in source._indices)
    write(paths[2], archive(samples(5, 7)))
    check(ShardsSource(paths), 12)
    assert built == [paths[2]]
    os.utime(paths[0], ns=(1, 1))
    paths[1].with_name(paths[1].name + ".index.npy").write_bytes(b"\x93NUMPY")
    check(ShardsSource(paths), 12)
    assert built == [paths[2], paths[0], paths[1]]


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "webp"])
def test_keys_labels_and_extensions_are_webdatasets(tmp_path: Path, extension: str) -> None:
    members = {
        f"./a/0.{extension}": png(0),
        "./a/0.cls": b" 5\n",
        "b.c/1.seg.png": png(9),  # not the image of key 1: its extension is seg.png
        f"b.c/1.{extension}": png(1),
        "._0.jpg": b"what macOS adds",
        "a/.png": b"hidden",
        "notes": b"",
        "7.cls": b"3",
        "b.c/1.cls": b"-1",
        f"é{'x' * 200}/2.{extension}": png(2),
    }
    source = ShardsSource([write(tmp_path / "x.tar", archive(members))])
    assert keys(source) == [f"a/0.{extension}", f"b.c/1.{extension}", f"é{'x' * 200}/2.{extension}"]
    assert source.labels is not None
    assert source.labels.tolist() == [5, -1, -1]
    assert [int(source.image(index)[0, 0, 0]) for index in range(3)] == [0, 1, 2]


def test_without_classes_images_are_unlabelled(tmp_path: Path) -> None:
    source = ShardsSource([write(tmp_path / "x.tar", archive({"0.png": png(0)}))])
    assert source.labels is None


@pytest.mark.parametrize(
    "key", ["a/0.jpg", "a.b/c.d.jpg", "100%.JPEG", "a%2Eb/%25.x.png", "%2E.%2E.png"]
)
def test_any_key_can_be_the_name_of_a_member(tmp_path: Path, key: str) -> None:
    source = ShardsSource(
        [write(tmp_path / "x.tar", archive({member_name(key): png(3), "z.png": png(4)}))]
    )
    assert keys(source) == [key, "z.png"]


def test_links_devices_and_sparse_files_are_no_images_and_nothing_is_unpacked(
    tmp_path: Path,
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (
            ("0.png", tarfile.SYMTYPE),
            ("1.png", tarfile.LNKTYPE),
            ("2.png", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in ("../../escaped.png", "/absolute.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png(8))
            tar.addfile(member, io.BytesIO(png(8)))
    path = write(tmp_path / "x" / "y" / "x.tar", buffer.getvalue())
    source = ShardsSource([path])
    assert keys(source) == ["../../escaped.png", "/absolute.png"]  # labels only
    assert source.image(0)[0, 0, 0] == 8
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == {
        "x/y/x.tar",
        "x/y/x.tar.index.npy",
    }


@pytest.mark.parametrize("layout", ["folders", "names", "pattern", "braces", "val_root"])
def test_both_splits_are_found(tmp_path: Path, layout: str) -> None:
    part = layout in ("folders", "braces")
    make(tmp_path / "train" if part else tmp_path)
    make(tmp_path / "val" if part else tmp_path, (2,), "val")
    options: dict[str, object] = {}
    root: Path = tmp_path
    if layout == "pattern":
        root, options["val_root"] = tmp_path / "train-*.tar", str(tmp_path / "val-000000.tar")
    elif layout == "braces":
        root, options["val_root"] = (
            tmp_path / "train" / "train-{000000..000002}.tar",
            str(tmp_path / "{train,val}" / "val-*.tar"),
        )
    elif layout == "val_root":
        options["val_root"] = str(tmp_path)
    check(load(root, **options), 10)
    check(load(root, "val", **options), 2)


def test_ranges_are_as_wide_as_written_and_nothing_may_be_missing(tmp_path: Path) -> None:
    paths = make(tmp_path, (1,) * 12)
    assert find_shards(f"{tmp_path}/train-{{000002..000010}}.tar", "train") == paths[2:11]
    assert find_shards(f"{tmp_path}/train-{{000001,000007}}.tar", "train") == [paths[1], paths[7]]
    with pytest.raises(ValueError, match=r"no shard at .*train-000012.tar"):
        find_shards(f"{tmp_path}/train-{{000002..000013}}.tar", "train")
    with pytest.raises(ValueError, match="too many shards"):
        find_shards(f"{tmp_path}/train-{{0..999999999999}}.tar", "train")


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("absent", "no shard at .*absent"),
        ("absent-*.tar", "no shards at .*absent"),
        ("empty", r"no shards in .*empty; expected train/\*.tar or train-\*.tar, or a pattern"),
        ("packed", r"train-0.tar.gz is compressed; images are read at random places"),
        ("packed2", r"x.tgz is compressed; images are read at random places"),
    ],
)
def test_shards_that_are_not_there_say_what_is_expected(
    tmp_path: Path, root: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "packed" / "train-0.tar.gz", b"")
    write(tmp_path / "packed2" / "train" / "x.tgz", b"")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / root)
    with pytest.raises(ValueError, match=r"needs data\.root=PATH"):
        load("")


def test_without_validation_shards_the_options_are_named(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(
        ValueError, match=r"no validation images in .* data.val_root=PATH.* data.val_fraction=0.2"
    ):
        load(tmp_path, "val")
    assert len(load(tmp_path, "val", val_fraction=0.5)) > 0
    with pytest.raises(ValueError, match="no shards in"):
        load(tmp_path, "val", val_root=str(tmp_path))


TAR = archive(samples(0, 4))
DAMAGED = {
    "empty": (b"", "cannot read .* as a tar file"),
    "text": (b"this is no tar" * 99, "cannot read .* as a tar file"),
    "zeros": (bytes(10240), "no images in"),
    "no image": (archive({"a.txt": b"", "a.cls": b"3"}), "no images in"),
    "gzip": (gzip.compress(TAR), r"compressed \(gzip\)"),
    "bzip2": (bz2.compress(TAR), r"compressed \(bzip2\)"),
    "xz": (lzma.compress(TAR), r"compressed \(xz\)"),
    "cut in a file": (TAR[: 512 + 60], "cannot read .* as a tar file: unexpected end of data"),
    "cut in a header": (TAR[:1300], "cut short or damaged at byte 1024"),
    "cut between files": (TAR[:2048], "cut short or damaged at byte 2048"),
    "damaged header": (
        TAR[:1024] + b"\xff" * 512 + TAR[1536:],
        "cut short or damaged at byte 1024",
    ),
    "two images of one key": (
        archive({"a.png": png(0), "a.jpg": png(1)}),
        "two images of the same key: a.png and a.jpg",
    ),
    "bad class": (
        archive({"a.png": png(0), "a.cls": b"cat", "b.png": png(0)}),
        r"the label of image 'a.png' is not the number",
    ),
    "class out of range": (
        archive({"a.png": png(0), "a.cls": b"-2"}),
        r"the label of image 'a.png' is not the number",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_shard_that_cannot_be_used_says_why(tmp_path: Path, kind: str) -> None:
    content, message = DAMAGED[kind]
    with pytest.raises(ValueError, match=message) as caught:
        ShardsSource([write(tmp_path / "x.tar", content)])
    assert "x.tar" in str(caught.value)


def test_bad_images_may_be_kept(tmp_path: Path) -> None:
    members = {
        **samples(0, 1),
        "1.png": png(1)[:20],
        "1.cls": b"3",
        "2.png": png(2),
        "2.cls": b"cat",
        "3.png": b"",
        **samples(4, 1),
    }
    write(tmp_path / "train-0.tar", archive(members))
    source = load(tmp_path)
    assert source.labels is not None
    assert source.labels.tolist() == [0, 3, -1, -1, 4]
    for index, message in (
        (1, "cannot decode image '1.png"),
        (2, "the label of image '2.png'"),
        (3, "the file is empty"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            source.image(index)
        assert "train-0.tar" in str(caught.value)
    assert source.image(4)[0, 0, 0] == 4
    with pytest.raises(ValueError, match=r"the label of image '2\.png'"):
        load(tmp_path, on_error=OnError["raise"])


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    (path,) = make(tmp_path, (4,))
    source = ShardsSource([path])
    source.image(3)
    os.truncate(path, 1000)
    with pytest.raises(
        ValueError, match=r"train-000000.tar changed since it was indexed: image '000003.png'"
    ):
        source.image(3)


def _read_all(source: ShardsSource, results: Queue[list[int]]) -> None:
    results.put([int(source.image(index)[0, 0, 0]) for index in range(len(source))])


def test_forked_and_pickled_sources_read_and_few_files_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN", 3)
    source = ShardsSource(make(tmp_path, (2,) * 8))
    check(source, 16)
    assert len(source._files) == 3
    data = pickle.dumps(source)
    assert len(data) < 2000
    check(pickle.loads(data), 16)
    context = multiprocessing.get_context("fork")
    results: Queue[list[int]] = context.Queue()
    processes = [context.Process(target=_read_all, args=(source, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) for _ in processes] == [list(range(16))] * 3
    for process in processes:
        process.join()
    check(source, 16)


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    first, copy, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c")
    assert ShardsSource(first).fingerprint() == ShardsSource(copy).fingerprint()
    write(other[1], archive({"000004.png": png(4), "000004.cls": b"3"}))
    assert ShardsSource(first).fingerprint() != ShardsSource(other).fingerprint()
    assert ShardsSource(first).fingerprint() != ShardsSource(first[:2]).fingerprint()


def flip(place: int, value: int) -> Callable[[bytes], bytes]:
    return lambda data: data[: place % len(data)] + bytes([value]) + data[place % len(data) + 1 :]


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.lists(
        st.builds(flip, st.one_of(st.integers(0, 511), st.integers(0, 20000)), st.integers(0, 255)),
        max_size=4,
    ),
    st.integers(0, 10240),
)
def test_whatever_bytes_there_are_only_our_own_errors_come_out(
    tmp_path: Path, format_: int, changes: list[Callable[[bytes], bytes]], cut: int
) -> None:
    data = archive({"x" * 60 + "/" + "y" * 60 + ".png": png(1), **samples(1, 2)}, format_)
    for change in changes:
        data = change(data)
    path = write(tmp_path / "x.tar", data[: len(data) - cut])
    path.with_name("x.tar.index.npy").unlink(missing_ok=True)
    try:
        source = ShardsSource([path], keep_bad=True)
    except ValueError as error:
        message = str(error)
    else:
        message = "x.tar"
        for index in range(len(source)):
            source.key(index)
            with suppress(ValueError):
                source.image(index)
    assert "x.tar" in message


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    ("length", "error"),
    [(2000, "whose name has 2,004 bytes"), (500_000, "a header of 50")],
)
def test_a_very_long_name_is_refused_and_makes_no_large_index(
    tmp_path: Path, format_: int, length: int, error: str
) -> None:
    members = {"x" * length + ".png": png(0), **samples(0, 50)}
    path = write(tmp_path / "a.tar", archive(members, format_))
    with pytest.raises(ValueError, match=error):
        ShardsSource([path])
    assert list(tmp_path.iterdir()) == [path]
    path = write(tmp_path / "b.tar", archive({"x" * 1000 + ".png": png(0)}, format_))
    assert len(ShardsSource([path]).key(0)) == 1004


def test_attributes_of_the_whole_archive_are_not_kept_for_every_member(tmp_path: Path) -> None:
    attributes = {f"k{number}": "v" for number in range(3000)}
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=attributes
    ) as tar:
        for number in range(1000):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    path = write(tmp_path / "a.tar", buffer.getvalue())
    tracemalloc.start()
    assert len(ShardsSource([path])) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20  # 160 MiB if every member keeps them
