"""The worker processes and the batches that they make."""

from __future__ import annotations

import base64
import gc
import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from ranks import other_children
from torch import Tensor

from seed_exp.data import loader, stall_warning
from seed_exp.data.digits import DigitsSource
from seed_exp.data.loader import default_num_workers, load_batches
from seed_exp.data.order import SampleOrder
from seed_exp.data.sources import Source
from seed_exp.data.tsv import TsvSource
from seed_exp.views.recipe import HostBatch, TrainViews


class Batch(NamedTuple):
    sums: Tensor
    labels: Tensor
    indices: Tensor
    epoch: int

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*map(function, self[:3]), self.epoch)


class Sums:
    """Collects sums of each image's pixels, and the epoch."""

    def empty(self, num: int) -> Batch:
        return Batch(*torch.full((3, num), -7), epoch=0)

    def host(
        self,
        images: Sequence[Tensor],
        labels: NDArray[np.int64],
        epoch: int,
        indices: NDArray[np.int64],
        out: Batch,
    ) -> None:
        for row, image in enumerate(images):
            out.sums[row] = image.sum() + epoch
        out.labels.copy_(torch.from_numpy(labels))
        out.indices.copy_(torch.from_numpy(indices))


def steps(order: SampleOrder, num: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    return (order.batch(step) for step in range(num))


def test_each_rank_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert [default_num_workers(ranks) for ranks in (1, 2, 8, 32)] == [15, 7, 1, 0]
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert default_num_workers(1) == 3


def made(source: Source, epoch: int, indices: NDArray[np.int64]) -> Batch:
    """A batch without loader and workers."""
    assert source.labels is not None
    batch = Sums().empty(len(indices))._replace(epoch=epoch)
    Sums().host(
        [source.image(index) for index in indices.tolist()],
        source.labels[indices],
        epoch,
        indices,
        batch,
    )
    return batch


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a.epoch == b.epoch


def photographs(shared: Path, folder: Path) -> TsvSource:
    path = folder / "imagenet_samples.tsv"
    shutil.copy(shared / "data" / path.name, path)
    return TsvSource(path)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_do_not_depend_on_the_workers(
    shared: Path, tmp_path: Path, num_workers: int
) -> None:
    source = photographs(shared, tmp_path)
    source.image(0)  # the parent has the file open when the workers start
    order = SampleOrder(len(source), 8, seed=0)
    expected = [made(source, epoch, indices) for epoch, indices in steps(order, 12)]
    batches = load_batches(source, Sums(), steps(order, 12), num_workers=num_workers)
    assert all(same(a, b) for a, b in zip(batches, expected, strict=True))


@pytest.mark.parametrize(
    ("batch_size", "num_workers"), [(1, 2), (2, 3), (5, 1), (5, 2), (33, 0), (33, 2), (64, 3)]
)
@pytest.mark.parametrize("max_slice", [3, 16])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_do_not_depend_on_the_slices_and_are_not_made_before_there_is_room(
    batch_size: int, num_workers: int, max_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_MAX_SLICE", max_slice)
    source, taken = DigitsSource("val"), 0

    def order() -> Iterator[tuple[int, NDArray[np.int64]]]:
        nonlocal taken
        for step in range(8):
            taken += 1
            last = step == 7  # of an evaluation, say: smaller than the others
            yield step // 3, (np.arange(1 if last else batch_size) * 7 + step) % len(source)

    batches = load_batches(source, Sums(), order(), num_workers=num_workers)
    for number, (expected, batch) in enumerate(
        zip([made(source, *item) for item in order()], batches, strict=True), 1
    ):
        assert same(batch, expected)
        # One of three buffers holds this batch: not even the work for a fourth is out.
        assert taken - 8 <= number + (2 if num_workers else 0)


def test_views_have_the_same_pixels_whatever_process_and_slice_they_come_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, views, indices = (
        tiny.Images(),
        TrainViews(tiny.views_config(), seed=4),
        np.arange(30)[::-1].copy(),
    )
    whole = views.empty(30)
    views.host(
        [source.image(index) for index in indices.tolist()],
        source.labels[indices],
        7,
        indices,
        whole,
    )
    for num_workers, max_slice in ((0, 16), (0, 4), (2, 16), (2, 1)):
        monkeypatch.setattr(loader, "_MAX_SLICE", max_slice)
        (batch,) = load_batches(source, views, [(7, indices)], num_workers=num_workers)
        assert batch.epoch == 7
        assert all(map(torch.equal, tensors(batch), tensors(whole)))


def tensors(batch: HostBatch) -> list[Tensor]:
    return [*batch.views.values(), *batch.draws.values(), batch.labels, batch.indices]


def test_a_batch_stays_as_it_is_until_the_next_is_asked_for() -> None:
    source, order = DigitsSource("val"), [(step, np.arange(12) + 12 * step) for step in range(10)]
    for item, batch in zip(order, load_batches(source, Sums(), order, num_workers=2), strict=True):
        time.sleep(0.05)  # for the workers to overtake
        assert same(batch, made(source, *item))


def test_two_iterations_at_once_do_not_disturb_each_other() -> None:
    source, order = DigitsSource("val"), [(step, np.arange(6) + 6 * step) for step in range(6)]
    forward, backward = (
        load_batches(source, Sums(), items, num_workers=1) for items in (order, order[::-1])
    )
    for a, b, first, second in zip(order, order[::-1], forward, backward, strict=True):
        assert same(first, made(source, *a))
        assert same(second, made(source, *b))


def test_an_empty_order_gives_no_batch() -> None:
    assert list(load_batches(DigitsSource("val"), Sums(), [], num_workers=2)) == []


def test_images_without_labels_are_minus_one() -> None:
    source = DigitsSource("val")
    source.labels = None  # type: ignore[assignment]
    batch = next(load_batches(source, Sums(), [(0, np.arange(3))], num_workers=0))
    assert batch.labels.tolist() == [-1, -1, -1]
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_reaches_the_caller_as_its_own_one_line_error(
    tmp_path: Path, num_workers: int
) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(
        "".join(f"k{number}\t0\t{base64.b64encode(b'junk').decode()}\n" for number in range(4))
    )
    with pytest.raises(
        ValueError, match=r"^cannot decode image 'k2 \(.*a.tsv, line 3\)' \(4 bytes\): [^\n]*$"
    ) as caught:
        list(
            load_batches(TsvSource(path), Sums(), [(0, np.array([2, 1]))], num_workers=num_workers)
        )
    assert type(caught.value) is ValueError
    wait_for_no_children()


def wait_for_no_children() -> None:
    deadline = time.monotonic() + 20
    while other_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not other_children()


def endless() -> Iterator[tuple[int, NDArray[np.int64]]]:
    return itertools.repeat((0, np.arange(4)))


def num_mapped() -> int:
    """Pieces of shared memory in this process."""
    return Path("/proc/self/maps").read_text().count("/torch_")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_closing_ends_the_workers_and_frees_the_memory() -> None:
    gc.collect()  # what the tracebacks of other tests hold
    before = num_mapped()
    batches = load_batches(DigitsSource("val"), Sums(), endless(), num_workers=2)
    for _ in range(5):
        next(batches)
    assert len(other_children()) == 2
    assert num_mapped() > before
    batches.close()
    wait_for_no_children()
    assert num_mapped() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_workers_outlive_a_signal_to_the_whole_job(number: signal.Signals) -> None:
    others = set(other_children())
    batches = load_batches(DigitsSource("val"), Sums(), endless(), num_workers=2)
    next(batches)
    workers = set(other_children()) - others
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, number)
    for _ in range(20):  # more than are waiting
        next(batches)
    assert set(other_children()) - others == workers
    batches.close()


class StuckSource(DigitsSource):
    """A read that does not come back, as of a file server that is gone."""

    def image(self, index: int) -> Tensor:
        if index >= 100:
            time.sleep(3600)
        return super().image(index)


@pytest.mark.slow
def test_closing_ends_a_worker_that_is_stuck_in_a_read() -> None:
    order = itertools.chain([(0, np.arange(4))], itertools.repeat((0, np.arange(100, 104))))
    batches = load_batches(StuckSource("val"), Sums(), order, num_workers=1)
    next(batches)
    batches.close()
    wait_for_no_children()


def test_a_killed_worker_is_an_error() -> None:
    batches = load_batches(DigitsSource("val"), Sums(), endless(), num_workers=2)
    next(batches)

    def kill_and_go_on() -> None:
        victim = other_children()[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        for _ in batches:
            pass

    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        kill_and_go_on()
    gc.collect()  # the traceback, which holds DataLoader's iterator
    wait_for_no_children()


def test_too_little_shared_memory_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: Tensor) -> Tensor:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)
    with pytest.raises(
        ValueError, match=r"no room for .* MiB in shared memory.*No space left.*data\.num_workers=0"
    ):
        next(load_batches(DigitsSource("val"), Sums(), endless(), num_workers=1))


def test_what_a_worker_is_given_does_not_grow_with_the_data(tmp_path: Path) -> None:
    path = tmp_path / "many.tsv"
    path.write_text("".join(f"{number}\t{number % 1000}\tAAAA\n" for number in range(100_000)))
    source = TsvSource(path)
    assert len(source) == 100_000
    assert len(pickle.dumps((source, TrainViews(tiny.views_config(), seed=0)))) < 10_000


@pytest.mark.slow
def test_workers_need_not_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)  # type: ignore[attr-defined]
    source, order = DigitsSource("val"), [(step, np.arange(12) + 12 * step) for step in range(5)]
    for item, batch in zip(order, load_batches(source, Sums(), order, num_workers=2), strict=True):
        assert same(batch, made(source, *item))
    wait_for_no_children()


# --- images that cannot be read -------------------------------------------------------------------


class Holes(DigitsSource):
    """Digits of which some cannot be read; `bad` holds their numbers."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__("val")
        self.bad = bad

    def image(self, index: int) -> Tensor:
        if index in self.bad:
            raise ValueError(f"no. {index} is broken")
        return super().image(index)


BAD = {3, 100, 101, 102, 359}


def replaced(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.array(
        [
            next(i % 360 for i in range(index, index + 360) if i % 360 not in BAD)
            for index in indices.tolist()
        ]
    )


@pytest.mark.parametrize(("num_workers", "max_slice"), [(0, 16), (1, 16), (2, 16), (2, 1), (3, 5)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_bad_image_is_replaced_by_the_next_good_one_whatever_reads_it(
    num_workers: int, max_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_MAX_SLICE", max_slice)
    source, order = Holes(BAD), SampleOrder(360, 40, seed=1)
    reports: list[tuple[int, str]] = []
    told_by_batch = []
    for item, batch in zip(
        steps(order, 18),
        load_batches(
            source,
            Sums(),
            steps(order, 18),
            num_workers=num_workers,
            on_bad=lambda *bad: reports.append(bad),
        ),
        strict=True,
    ):
        epoch, indices = item
        assert same(batch, made(source, epoch, replaced(indices)))
        told_by_batch.append(len(reports))
    met = [
        index
        for _, indices in steps(order, 9)
        for start in indices.tolist()
        for index in range(start, start + 4)
    ]
    expected = list(dict.fromkeys(_met(order, 9)))
    assert [index for index, _ in reports] == expected
    assert set(expected) == BAD
    assert set(met) >= BAD
    assert [error for _, error in reports] == [f"no. {index} is broken" for index in expected]
    assert told_by_batch[8:] == [5] * 10  # in the second epoch nothing is new
    assert told_by_batch[:9] == [
        len(set(_met(order, num))) for num in range(1, 10)
    ]  # each before its batch


def _met(order: SampleOrder, num_steps: int) -> Iterator[int]:
    """Bad images in the order in which they are met."""
    for _, indices in steps(order, num_steps):
        for index in indices.tolist():
            while index % 360 in BAD:
                yield index % 360
                index += 1


def test_views_of_the_replacement_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    views = TrainViews(tiny.views_config(), seed=4)
    (batch,) = load_batches(
        Holes(BAD), views, [(7, np.array([3, 5, 101]))], num_workers=2, on_bad=lambda *_: None
    )
    (good,) = load_batches(Holes(set()), views, [(7, np.array([4, 5, 103]))], num_workers=0)
    assert all(map(torch.equal, tensors(batch), tensors(good)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_without_a_good_image_the_search_ends(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    for limit, message in (
        (10_000, "none of them can be read, the last: no. "),
        (50, "none of 50 in succession from number "),
    ):
        monkeypatch.setattr(loader, "_MAX_BAD_RUN", limit)
        found.clear()
        with pytest.raises(ValueError, match=f"^of 360 images {message}"):
            next(
                load_batches(
                    Holes(set(range(360))),
                    Sums(),
                    [(0, np.arange(8) + 5)],
                    num_workers=num_workers,
                    on_bad=lambda index, _: found.append(index),
                )
            )
        assert found == [
            (5 + step) % 360 for step in range(min(limit, 360))
        ]  # told before the search is given up
    wait_for_no_children()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_on_bad_raises_ends_the_iteration(num_workers: int) -> None:
    def enough(index: int, error: str) -> None:
        raise ValueError(f"enough: {error}")

    batches = load_batches(
        Holes({9}),
        Sums(),
        [(0, np.arange(8)), (0, np.arange(8) + 8)],
        num_workers=num_workers,
        on_bad=enough,
    )
    assert next(batches).indices.tolist() == list(range(8))
    with pytest.raises(ValueError, match=r"enough: no\. 9 is broken"):
        next(batches)
    wait_for_no_children()


class Slow(DigitsSource):
    """Digits of which one takes its time."""

    def __init__(self, slow: int, seconds: float, key_seconds: float = 0) -> None:
        super().__init__("val")
        self.slow, self.seconds, self.key_seconds = slow, seconds, key_seconds

    def image(self, index: int) -> Tensor:
        if index == self.slow:
            time.sleep(self.seconds)
        return super().image(index)

    def key(self, index: int) -> str:
        time.sleep(self.key_seconds)
        return super().key(index)


@pytest.mark.parametrize(("num_workers", "reader"), [(0, ""), (1, "worker 0 is ")])
def test_a_source_that_stalls_is_reported_again_and_again(
    num_workers: int, reader: str, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stall_warning, "_STALL_SECONDS", 0.3)
    order = [(0, np.arange(4) + 4 * step) for step in range(5)]
    batches = load_batches(Slow(13, 1.3), Sums(), order, num_workers=num_workers)
    for _ in range(3):
        next(batches)
    time.sleep(0.5)  # in which nobody waits
    logged.clear()
    next(batches)
    assert all(
        re.fullmatch(
            rf"WARNING waiting for data for \d s; {reader}reading digit-1450 \(number 13\)", line
        )
        for line in logged
    )
    assert 1 <= len(logged) <= 4
    num = len(logged)
    time.sleep(0.5)
    next(batches)
    assert len(logged) == num


def test_a_key_that_stalls_too_does_not_keep_the_warning_back(
    logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stall_warning, "_STALL_SECONDS", 0.2)
    next(load_batches(Slow(2, 2.5, key_seconds=60), Sums(), [(0, np.arange(4))], num_workers=1))
    assert any("worker 0 is reading image number 2" in line for line in logged)


def test_no_thread_is_left_behind() -> None:
    def watching() -> int:
        return [thread.name for thread in threading.enumerate()].count("seed_exp data watch")

    for num_workers in (0, 1):
        batches = load_batches(DigitsSource("val"), Sums(), endless(), num_workers=num_workers)
        next(batches)
        assert watching() == 1
        batches.close()
        assert watching() == 0


# --- with a GPU -----------------------------------------------------------------------------------


def on_gpu(num_workers: int) -> Iterator[tuple[HostBatch, HostBatch]]:
    """Batches on the GPU beside the same on the host."""
    source, views = tiny.Images(400), TrainViews(tiny.views_config(), seed=4)
    order = [(step, np.arange(32) + 7 * step) for step in range(40)] + [(40, np.arange(5))]
    device = torch.device("cuda", torch.cuda.current_device())
    moved = load_batches(source, views, order, num_workers=num_workers, device=device)
    return zip(moved, load_batches(source, views, order, num_workers=0), strict=True)


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("busy", [False, True])
def test_a_gpu_sees_each_batch_whole_while_the_host_runs_ahead(
    num_workers: int, busy: bool
) -> None:
    seen = []
    weight = torch.randn(4096, 4096, device="cuda")
    for batch, host in on_gpu(num_workers):
        assert torch.equal(batch.indices, host.indices)  # on the host, where they are asked for
        batch, host = (side._replace(indices=side.labels) for side in (batch, host))
        assert all(tensor.device.type == "cuda" for tensor in tensors(batch))
        assert batch.epoch == host.epoch
        for _ in range(
            20 if busy else 0
        ):  # queued, so that the host asks for the next batches before this one is read
            weight = torch.tanh(weight @ weight)
        seen.append(
            [
                torch.stack([tensor.double().sum() for tensor in tensors(side)])
                for side in (batch, host)
            ]
        )
    for on_device, on_host in seen:
        torch.testing.assert_close(on_device.cpu(), on_host)


@pytest.mark.gpu
def test_closing_early_unlocks_the_pages() -> None:
    for _ in range(3):  # memory that is still registered cannot be registered again
        pairs = on_gpu(num_workers=2)
        next(pairs)
        del pairs
    wait_for_no_children()
    torch.cuda.synchronize()


def tensors_of(batch: HostBatch) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    batch.map(keep)
    return found


def test_a_worker_collects_few_large_images_and_the_batches_stay_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = tiny.Images(40)  # of 300 bytes
    views = TrainViews(tiny.views_config(), seed=1)
    order = [(2, np.arange(start, start + 10)) for start in (0, 7, 30)]

    def batches() -> list[HostBatch]:
        found = load_batches(source, views, order, num_workers=0)
        return [batch.map(Tensor.clone) for batch in found]

    sizes: list[int] = []
    host = views.host

    def counting(images: Sequence[Tensor], *rest: object) -> None:
        sizes.append(len(images))
        host(images, *rest)

    monkeypatch.setattr(views, "host", counting)
    expected = batches()
    assert sizes == [10, 10, 10]
    monkeypatch.setattr(loader, "_MAX_DECODED", 1000)
    found = batches()
    assert sizes[3:] == [4, 4, 2] * 3  # 1200 bytes: the bound and one image at most
    for one, other in zip(expected, found, strict=True):
        assert (one.epoch, one.indices.tolist()) == (other.epoch, other.indices.tolist())
        assert all(map(torch.equal, tensors_of(one), tensors_of(other)))


@pytest.mark.parametrize(("parent", "status"), [(os.getpid, 0), (os.getppid, 1)])
def test_a_worker_whose_parent_was_killed_before_it_began_ends(
    parent: Callable[[], int], status: int
) -> None:
    # Its parent is then another process than the one that asked for it.
    fork = multiprocessing.get_context("fork")
    worker = fork.Process(target=loader._begin_worker, args=(parent(), False, 0))
    worker.start()
    worker.join(30)
    assert worker.exitcode == status
