"""Order of the images and the worker processes."""

from __future__ import annotations

import base64
import itertools
import multiprocessing
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from seed_exp.data.digits import DigitsSource
from seed_exp.data.loader import SampleOrder, default_num_workers, load_batches
from seed_exp.data.tsv import TsvSource


class Batch(NamedTuple):
    views: dict[str, Tensor]
    labels: Tensor
    epoch: int
    indices: NDArray[np.int64]


def make(images: Sequence[Tensor], labels: NDArray[np.int64], epoch: int, indices: NDArray[np.int64]) -> Batch:
    sums = torch.stack([image.sum() + epoch for image in images])
    return Batch({"global": sums}, torch.from_numpy(labels), epoch, indices)


def steps(order: SampleOrder, num: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    return (order.batch(step) for step in range(num))


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4), st.integers(-3, 2**70), st.integers(0, 50))
def test_ranks_together_see_what_one_process_sees(samples: int, per_rank: int, world: int, seed: int, step: int) -> None:
    batch_size = per_rank * world
    samples += batch_size
    epoch, whole = SampleOrder(samples, batch_size, seed).batch(step)
    parts = [SampleOrder(samples, batch_size, seed, rank, world).batch(step) for rank in range(world)]
    assert [part[0] for part in parts] == [epoch] * world
    assert [len(part[1]) for part in parts] == [per_rank] * world
    assert np.array_equal(np.concatenate([part[1] for part in parts]), whole)


@pytest.mark.parametrize(("samples", "batch_size"), [(24, 4), (26, 4), (7, 7), (5, 1)])
def test_an_epoch_has_every_image_at_most_once_and_whole_batches_only(samples: int, batch_size: int) -> None:
    order = SampleOrder(samples, batch_size, seed=3)
    assert order.steps_per_epoch == samples // batch_size
    epochs = []
    for epoch in range(3):
        batches = [order.batch(epoch * order.steps_per_epoch + position) for position in range(order.steps_per_epoch)]
        assert all(number == epoch and len(indices) == batch_size for number, indices in batches)
        epochs.append(np.concatenate([indices for _, indices in batches]))
        assert len(set(epochs[-1])) == len(epochs[-1]) == samples // batch_size * batch_size
        assert set(epochs[-1]) <= set(range(samples))
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_order_is_pure() -> None:
    order = SampleOrder(100, 10, seed=1)
    forward = [order.batch(step) for step in range(40)]
    backward = [SampleOrder(100, 10, seed=1).batch(step) for step in reversed(range(40))][::-1]
    assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(forward, backward, strict=True))
    assert not np.array_equal(order.batch(0)[1], SampleOrder(100, 10, seed=2).batch(0)[1])


def test_the_order_never_changes() -> None:
    # A run continued with a later version must meet the images that it has not seen in this epoch.
    assert SampleOrder(8, 8, seed=0).batch(0)[1].tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_each_position_is_equally_likely() -> None:
    order = SampleOrder(6, 6, seed=5)
    places = np.zeros((6, 6))
    for epoch in range(3000):
        places[np.arange(6), order.batch(epoch)[1]] += 1
    assert np.abs(places / 3000 - 1 / 6).max() < 0.03  # 4.4 standard deviations


def test_impossible_batch_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=10 does not divide by the 4 processes"):
        SampleOrder(100, 10, 0, 0, 4)
    with pytest.raises(ValueError, match="batch_size=128 exceeds the 67 images; take batch_size=67 or less"):
        SampleOrder(67, 128, 0)


def test_each_rank_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert [default_num_workers(ranks) for ranks in (1, 2, 8, 32)] == [15, 7, 1, 0]
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert default_num_workers(1) == 3


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.views["global"], b.views["global"]) and torch.equal(a.labels, b.labels) and a.epoch == b.epoch


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_do_not_depend_on_the_workers(shared: Path, tmp_path: Path, num_workers: int) -> None:
    path = tmp_path / "imagenet_samples.tsv"
    shutil.copy(shared / "data" / path.name, path)
    source = TsvSource(path)
    source.image(0)  # the parent has the file open when the workers start
    order = SampleOrder(len(source), 8, seed=0)
    expected = []
    for epoch, indices in steps(order, 12):
        assert source.labels is not None
        expected.append(make([source.image(int(index)) for index in indices], source.labels[indices], epoch, indices))
    batches = list(load_batches(source, make, steps(order, 12), num_workers=num_workers))
    assert len(batches) == 12
    assert all(same(a, b) for a, b in zip(batches, expected, strict=True))
    assert all(isinstance(batch.indices, np.ndarray) for batch in batches)  # passed on as `make` returned it


def test_images_without_labels_are_minus_one() -> None:
    source = DigitsSource("val")
    source.labels = None  # type: ignore[assignment]
    batch = next(load_batches(source, make, [(0, np.arange(3))], num_workers=0))
    assert batch.labels.tolist() == [-1, -1, -1]
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_reaches_the_caller_as_its_own_one_line_error(tmp_path: Path, num_workers: int) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"k{number}\t0\t{base64.b64encode(b'junk').decode()}\n" for number in range(4)))
    with pytest.raises(ValueError, match=r"^cannot decode image 'k2 \(.*a.tsv, line 3\)' \(4 bytes\): [^\n]*$") as caught:
        list(load_batches(TsvSource(path), make, [(0, np.array([2, 1]))], num_workers=num_workers))
    assert type(caught.value) is ValueError
    wait_for_no_children()


def wait_for_no_children() -> None:
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def test_an_endless_order_is_read_as_it_is_needed_and_closing_ends_the_workers() -> None:
    taken = 0

    def endless() -> Iterator[tuple[int, NDArray[np.int64]]]:
        nonlocal taken
        for taken in itertools.count(1):  # noqa: B007
            yield 0, np.arange(4)

    batches = load_batches(DigitsSource("val"), make, endless(), num_workers=2)
    for _ in range(5):
        next(batches)
    assert taken <= 5 + 2 * 2
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # type: ignore[attr-defined]
    wait_for_no_children()
