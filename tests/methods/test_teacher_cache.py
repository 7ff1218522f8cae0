from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disks import fill
from torch import Tensor

from seed_exp.methods.teacher_cache import TeacherCache

NUM_VIEWS = {"global": 2, "local": 3}
KEY = {
    "teacher": "abc",
    "views": {"name": "tiny", "crops": {"global": {"scale": [0.2, 1.0]}}},
    "seed": 1,
}
FORK = multiprocessing.get_context("fork")


def cache(
    folder: Path,
    key: dict[str, Any] = KEY,
    *,
    dim: int = 4,
    num_images: int = 40,
    num_views: dict[str, int] = NUM_VIEWS,
    in_pairs: bool = False,
    of_sizes: bool = False,
) -> TeacherCache:
    return TeacherCache(
        folder,
        key,
        num_images=num_images,
        num_views=num_views,
        embedding_dim=dim,
        in_pairs=in_pairs,
        of_sizes=of_sizes,
    )


def embed(epoch: int, indices: Tensor, *, dim: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Unit vectors that depend on epoch and image, as a teacher's do."""
    out = {}
    for number, (name, num) in enumerate(NUM_VIEWS.items()):
        rows = [
            np.random.default_rng((seed, epoch, i, number)).standard_normal((num, dim))
            for i in indices.tolist()
        ]
        vectors = np.stack(rows, axis=1)
        out[name] = torch.from_numpy(
            (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float32)
        )
    return out


def same(one: dict[str, Tensor] | None, two: dict[str, Tensor]) -> bool:
    return (
        one is not None
        and one.keys() == two.keys()
        and all(torch.equal(one[name], two[name]) for name in two)
    )


def held(one: TeacherCache, epoch: int, **options: Any) -> int:
    """How many images the cache has; each one that it has must be right."""
    num = 0
    for index in range(one.num_images):
        image = torch.tensor([index])
        found = one.read(epoch, image)
        if found is not None:
            assert same(found, embed(epoch, image, dim=one.embedding_dim, **options))
            num += 1
    return num


def refuse_to_open_for_writing(
    path: Any, flags: int, *args: Any, open_: Callable[..., int] = os.open, **options: Any
) -> int:
    # Permissions do not bind root, under which tests may run.
    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return open_(path, flags, *args, **options)


def test_the_embedding_of_a_mixed_view_is_that_of_the_same_pair_only(tmp_path: Path) -> None:
    mixed, plain = cache(tmp_path / "mixed", in_pairs=True), cache(tmp_path / "plain")
    written = torch.tensor([3, 8, 20, 1])
    for one in (mixed, plain):
        one.write(0, written, embed(0, written))
    for found in ([20, 1, 3, 8], [8, 3]):  # other batches, the other order
        indices = torch.tensor(found)
        assert same(mixed.read(0, indices), embed(0, indices))
    replaced = torch.tensor([3, 9, 20, 1])  # image 8 cannot be read any more
    mixed.write(1, written, embed(1, written))
    mixed.write(1, replaced[:2], embed(1, replaced[:2], seed=5))
    assert mixed.read(1, written) is None  # 3 is now mixed with 9
    assert same(mixed.read(1, replaced[:2]), embed(1, replaced[:2], seed=5))
    assert mixed.read(0, torch.tensor([3, 20])) is None
    assert same(plain.read(0, torch.tensor([3, 20])), embed(0, torch.tensor([3, 20])))


def test_the_embedding_of_a_view_is_that_of_the_same_size_only(tmp_path: Path) -> None:
    sized, plain = cache(tmp_path / "sized", of_sizes=True), cache(tmp_path / "plain")
    indices = torch.tensor([3, 8, 20])
    for one in (sized, plain):
        one.write(0, indices, embed(0, indices), 56)
        one.write(0, indices[:1], embed(0, indices[:1], seed=5), 84)
    assert same(sized.read(0, indices[1:], 56), embed(0, indices[1:]))
    assert sized.read(0, indices[1:], 84) is None
    assert sized.read(0, indices, 56) is None  # image 3 is there with 84 pixels
    assert same(sized.read(0, indices[:1], 84), embed(0, indices[:1], seed=5))
    assert same(plain.read(0, indices[1:]), embed(0, indices[1:]))  # as in earlier versions


def test_what_is_written_is_read_bit_for_bit_in_any_order_by_any_process(tmp_path: Path) -> None:
    first = cache(tmp_path / "new" / "cache")
    for epoch in (0, 3, 1):
        for indices in torch.randperm(40).split(8):
            first.write(epoch, indices, embed(epoch, indices))
    for reader in (first, cache(first.folder.parent)):
        for epoch in (1, 0, 3):
            indices = torch.randperm(40)[:9]
            found = reader.read(epoch, indices)
            assert same(found, embed(epoch, indices))
            assert found is not None
            assert all(
                tensor.dtype == torch.float32 and tensor.is_contiguous()
                for tensor in found.values()
            )
        assert reader.read(2, torch.arange(8)) is None


def test_the_order_in_which_resolutions_are_named_does_not_matter(tmp_path: Path) -> None:
    indices = torch.arange(8)
    cache(tmp_path).write(0, indices, embed(0, indices))
    turned = dict(reversed(NUM_VIEWS.items()))
    assert same(cache(tmp_path, num_views=turned).read(0, indices), embed(0, indices))


def test_what_is_read_of_one_image_belongs_to_the_caller(tmp_path: Path) -> None:
    one, indices = cache(tmp_path), torch.tensor([5])
    one.write(0, indices, embed(0, indices))
    found = one.read(0, indices)
    assert found is not None
    found["global"].zero_()
    assert same(one.read(0, indices), embed(0, indices))


def test_embeddings_of_another_shape_are_not_spread_over_the_views(tmp_path: Path) -> None:
    indices = torch.arange(8)
    first_view_only = {name: embeddings[:1] for name, embeddings in embed(0, indices).items()}
    with pytest.raises(AssertionError):
        cache(tmp_path).write(0, indices, first_view_only)


@pytest.mark.parametrize("absent", [0, 3, 7, 39])
def test_a_batch_of_which_an_image_is_missing_is_not_there(tmp_path: Path, absent: int) -> None:
    one = cache(tmp_path)
    written = torch.tensor([index for index in range(40) if index != absent])
    one.write(0, written, embed(0, written))
    assert one.read(0, torch.tensor([5, absent, 20])) is None
    assert held(one, 0) == 39


@pytest.mark.parametrize(("dim", "seed"), [(4, 0), (100, 1), (128, 2), (128, 3), (2048, 4)])
def test_a_row_of_which_a_sector_was_lost_is_not_there(tmp_path: Path, dim: int, seed: int) -> None:
    one, indices = cache(tmp_path, dim=dim), torch.arange(40)
    one.write(0, indices, embed(0, indices, dim=dim))
    (file,) = tmp_path.rglob("epoch_*")
    content = bytearray(file.read_bytes())
    lost = 512 * np.flatnonzero(np.random.default_rng(seed).random(-(-len(content) // 512)) < 0.02)
    lost = lost if len(lost) else [0]
    for start in lost:
        content[start : start + 512] = bytes(min(512, len(content) - start))
    file.write_bytes(content)
    size = len(content) // 40
    torn = [
        index
        for index in range(40)
        if any(index * size < start + 512 and start < (index + 1) * size for start in lost)
    ]
    assert held(one, 0) == 40 - len(torn)


@pytest.mark.parametrize("byte", [0, 3, 4, 40, 83])
def test_a_row_with_a_changed_bit_is_not_there(tmp_path: Path, byte: int) -> None:
    one, indices = cache(tmp_path), torch.arange(40)
    one.write(0, indices, embed(0, indices))
    (file,) = tmp_path.rglob("epoch_*")
    content = bytearray(file.read_bytes())
    assert len(content) == 40 * 84 == one.bytes_per_epoch
    content[7 * 84 + byte] ^= 1
    file.write_bytes(content)
    assert one.read(0, torch.tensor([7])) is None
    assert held(one, 0) == 39


@pytest.mark.parametrize("size", [0, 1, 84 * 20, 84 * 20 + 50])
def test_a_file_cut_short_has_the_rows_before_the_cut_and_takes_the_others_again(
    tmp_path: Path, size: int
) -> None:
    one, indices = cache(tmp_path), torch.arange(40)
    one.write(0, indices, embed(0, indices))
    os.truncate(next(tmp_path.rglob("epoch_*")), size)
    assert held(one, 0) == size // 84
    one.write(0, indices, embed(0, indices))
    assert held(one, 0) == 40


def test_rows_of_another_epoch_or_another_cache_do_not_count(tmp_path: Path) -> None:
    one, indices = cache(tmp_path / "one"), torch.arange(40)
    one.write(0, indices, embed(0, indices))
    other = cache(tmp_path / "other", {**KEY, "seed": 2})
    shutil.copy(one.folder / "epoch_0000.bin", one.folder / "epoch_0001.bin")
    shutil.copy(one.folder / "epoch_0000.bin", other.folder / "epoch_0000.bin")
    assert held(one, 1) == 0
    assert held(other, 0) == 0


# Whose folder it is.


CHANGES: list[dict[str, Any]] = [
    {"key": KEY | {"seed": 2}},
    {"key": {"teacher": "abc", "views": KEY["views"]}},
    {"key": KEY | {"views": {"name": "tiny", "crops": {"global": {"scale": [0.1, 1.0]}}}}},
    {"num_images": 41},
    {"dim": 5},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_another_key_has_a_folder_of_its_own_beside_the_others(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    one, indices = cache(tmp_path), torch.arange(40)
    one.write(0, indices, embed(0, indices))
    other = cache(tmp_path, **changes)
    assert other.folder != one.folder
    assert other.folder.parent == one.folder.parent == tmp_path
    assert other.read(0, torch.arange(8)) is None
    dim = changes.get("dim", 4)
    other.write(0, indices, embed(0, indices, dim=dim, seed=5))
    assert held(other, 0, seed=5) == 40
    assert held(cache(tmp_path), 0) == 40
    shown = json.loads((other.folder / "key.json").read_text())
    assert shown["embedding_dim"] == dim
    assert shown.get("seed") == changes.get("key", KEY).get("seed")


def test_numbers_that_json_writes_differently_are_the_same_key(tmp_path: Path) -> None:
    indices = torch.arange(8)
    cache(tmp_path, {"scale": (0.2, 1)}).write(0, indices, embed(0, indices))
    assert same(cache(tmp_path, {"scale": [0.2, 1.0]}).read(0, indices), embed(0, indices))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"teacher_cache=.*notes is a file; give a folder"):
        cache(tmp_path / "notes")


def test_a_cache_of_an_earlier_version_is_left_alone_and_named(
    tmp_path: Path, logged: list[str]
) -> None:
    (tmp_path / "key.json").write_text("{}")
    (tmp_path / "epoch_0000.bin").write_text("old")
    one, indices = cache(tmp_path), torch.arange(40)
    one.write(0, indices, embed(0, indices))
    assert (tmp_path / "epoch_0000.bin").read_text() == "old"
    assert held(one, 0) == 40
    assert [line for line in logged if "of an earlier version" in line]


def test_the_remains_of_a_key_that_was_never_finished_do_not_matter(tmp_path: Path) -> None:
    one = cache(tmp_path)
    (one.folder / "key.json").rename(one.folder / ".key.json.x1y2.tmp")
    again = cache(tmp_path)
    assert again.folder == one.folder
    assert json.loads((one.folder / "key.json").read_text())["teacher"] == "abc"


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def test_pickles_links_and_pipes_that_others_put_into_it_are_missing_rows(
    tmp_path: Path, logged: list[str]
) -> None:
    one, indices, precious = cache(tmp_path / "c"), torch.arange(40), tmp_path / "precious"
    precious.write_text("mine")
    harm = pickle.dumps(Runs(tmp_path / "ran"))
    (one.folder / "key.json").write_bytes(harm)
    (one.folder / "epoch_0000.bin").write_bytes(harm * 100)
    (one.folder / "epoch_0001.bin").symlink_to(precious)
    os.mkfifo(one.folder / "epoch_0002.bin")
    for epoch in range(3):
        one = cache(tmp_path / "c")
        assert one.read(epoch, indices) is None
        one.write(epoch, indices, embed(epoch, indices))
    assert [held(one, epoch) for epoch in range(3)] == [40, 0, 0]
    assert len([line for line in logged if "going on without adding to it" in line]) == 2
    assert precious.read_text() == "mine"
    assert not (tmp_path / "ran").exists()


# Whatever happens meanwhile.


def write_for_ever(folder: Path, dim: int, seed: int) -> None:
    one = cache(folder, dim=dim)
    batches = [
        (indices, embed(0, indices, dim=dim, seed=seed)) for indices in torch.arange(40).split(8)
    ]
    while True:
        for indices, embeddings in batches:
            one.write(0, indices, embeddings)


def test_a_killed_writer_leaves_only_right_rows(tmp_path: Path) -> None:
    dim, counts = (
        4096,
        set(),
    )  # rows of 20 pages, between any two of which a signal may end the write
    expected = embed(0, torch.arange(40), dim=dim)
    for attempt in range(12):
        folder = tmp_path / str(attempt)
        process = FORK.Process(target=write_for_ever, args=(folder, dim, 0))
        process.start()
        while not list(folder.rglob("epoch_0000.bin")):
            process.join(0.0005)
        process.join(0.0002 * attempt)
        process.kill()
        process.join()
        one = cache(folder, dim=dim)
        found = {index: one.read(0, torch.tensor([index])) for index in range(40)}
        for index, row in found.items():
            assert row is None or same(
                row, {name: every[:, index : index + 1] for name, every in expected.items()}
            )
        counts.add(sum(row is not None for row in found.values()))
        one.write(0, torch.arange(40), expected)
        assert same(one.read(0, torch.arange(40)), expected)
    assert max(counts) > 0


def test_runs_that_write_different_values_at_once_never_mix_them_in_a_row(tmp_path: Path) -> None:
    dim = 4096
    one = cache(tmp_path, dim=dim)
    either = [embed(0, torch.arange(40), dim=dim, seed=seed) for seed in (0, 1)]
    writers = [FORK.Process(target=write_for_ever, args=(tmp_path, dim, seed)) for seed in (0, 1)]
    for writer in writers:
        writer.start()
    try:
        while not (one.folder / "epoch_0000.bin").exists():
            writers[0].join(0.001)
        seen = 0
        while seen < 500:
            index = seen % 40
            row = one.read(0, torch.tensor([index]))
            seen += 1
            assert row is None or any(
                same(row, {name: every[:, index : index + 1] for name, every in written.items()})
                for written in either
            )
    finally:
        for writer in writers:
            writer.kill()
            writer.join()


@pytest.mark.parametrize("room", [0, 1 << 20])
def test_a_full_disk_costs_rows_and_one_warning_but_not_the_training(
    small_disk: Path, logged: list[str], room: int
) -> None:
    dim = 4096  # 40 rows of 80 kB
    one = cache(small_disk, dim=dim)
    ballast = fill(small_disk, leave=room)
    for indices in torch.arange(40).split(8):
        one.write(0, indices, embed(0, indices, dim=dim))
    assert [line.partition("teacher cache")[0] for line in logged] == [
        "WARNING cannot write to the "
    ]
    assert "No space left" in logged[0]
    whole = [index for index in range(40) if one.read(0, torch.tensor([index])) is not None]
    assert len(whole) == room * 40 // one.bytes_per_epoch
    for index in whole:
        indices = torch.tensor([index])
        assert same(one.read(0, indices), embed(0, indices, dim=dim))
    ballast.unlink()
    again, indices = cache(small_disk, dim=dim), torch.arange(40)
    again.write(0, indices, embed(0, indices, dim=dim))
    assert same(again.read(0, indices), embed(0, indices, dim=dim))


def test_a_cache_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    indices = torch.arange(40)
    cache(tmp_path).write(0, indices, embed(0, indices))
    monkeypatch.setattr(os, "open", refuse_to_open_for_writing)
    one = cache(tmp_path)
    assert held(one, 0) == 40
    assert logged == []
    one.write(1, indices, embed(1, indices))
    one.write(2, indices, embed(2, indices))
    assert len(logged) == 1
    assert one.read(1, indices) is None


def test_an_epoch_file_that_cannot_be_read_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    one = cache(tmp_path / "cache")
    (one.folder / "epoch_0000.bin").mkdir()
    assert one.read(0, torch.arange(8)) is None


# Costs.


def free_space(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda folder: shutil._ntuple_diskusage(2 * num_bytes, num_bytes, num_bytes),
    )


def test_the_size_is_that_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_space(monkeypatch, 10**12)
    one = cache(
        tmp_path / "one", dim=128, num_images=1_281_167, num_views={"global": 1, "local": 6}
    )
    assert one.describe(200) == (
        f"teacher cache {one.folder}: (7 views x 128 floats + checksum) x 4 bytes x "
        "1,281,167 images x 200 epochs"
        " = 919GB; 0.00B are there, the disk has 1.00TB free"
    )
    small, indices = cache(tmp_path / "two"), torch.arange(40)
    small.write(0, indices, embed(0, indices))
    assert next((tmp_path / "two").rglob("epoch_*")).stat().st_size == small.bytes_per_epoch


def test_what_is_there_is_what_the_disk_gave_to_the_epochs_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_space(monkeypatch, 10**12)
    one = cache(tmp_path, dim=2048, num_images=10_000)
    for epoch, indices in (
        (0, torch.arange(9950, 10_000)),
        (1, torch.arange(25)),
        (5, torch.arange(50)),
    ):
        one.write(epoch, indices, embed(epoch, indices, dim=2048))
    # 75 rows of 41 kB, not the 410 MB at which the first of the sparse files ends.
    assert re.search(r"= 819MB; 3\.\d\dMB are there", one.describe(2))


def test_a_new_cache_without_room_is_refused_and_one_begun_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, indices = cache(tmp_path), torch.arange(40)
    free_space(monkeypatch, 10 * one.bytes_per_epoch)
    assert one.describe(10).endswith(" free")
    with pytest.raises(
        ValueError, match=r"would need .* x 11 epochs = 37.0kB, but its disk has 33.6kB free"
    ):
        one.describe(11)
    one.write(0, indices, embed(0, indices))
    assert one.describe(11).endswith(
        "; 3.36kB are there, the disk has 33.6kB free"
    )  # rows, not whole blocks
    assert one.describe(12).endswith(" free, not enough for the rest")


def test_an_image_with_an_embedding_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    ours, indices = cache(tmp_path), torch.tensor([3, 5])
    embeddings = embed(0, indices)
    embeddings["local"][1, 0, 2] = torch.nan
    ours.write(0, indices, embeddings)
    assert ours.read(0, indices[:1]) is None
    found = ours.read(0, indices[1:])
    assert found is not None
    assert torch.equal(found["local"][:, 0], embeddings["local"][:, 1])


def test_a_step_does_not_wait_for_the_disk_and_the_end_of_the_training_does(tmp_path: Path) -> None:
    one, disk = cache(tmp_path), threading.Event()
    write_at_once = one.write

    def write(*args: Any) -> None:
        assert disk.wait(60)
        write_at_once(*args)

    one.write = write  # type: ignore[method-assign]
    batches = [torch.arange(10) + 10 * number for number in range(4)]
    for indices in batches:
        reused = indices.clone()
        one.write_soon(0, reused, embed(0, indices))
        reused.fill_(-1)  # the next batch's indices come into the same memory
    assert held(one, 0) == 0
    disk.set()
    one.close()
    assert held(one, 0) == 40


def test_an_error_in_the_thread_is_not_lost(tmp_path: Path) -> None:
    one = cache(tmp_path)
    one.write_soon(0, torch.arange(2), {})
    with pytest.raises(KeyError):
        one.close()
