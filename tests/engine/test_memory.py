"""Memory of a backward pass is counted right; the batch size found is the largest that fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from seed_exp.engine import distributed, memory
from seed_exp.engine.memory import activation_bytes, available_memory, largest_batch_size

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def leaf(num: int) -> Tensor:
    return torch.zeros(num, requires_grad=True)


def test_what_autograd_saves_is_counted_in_bytes() -> None:
    x = leaf(1000)
    assert activation_bytes(lambda: x.exp()) == 4000  # its result
    assert activation_bytes(lambda: x + x) == 0
    assert activation_bytes(lambda: x.double().exp()) == 8000
    assert activation_bytes(lambda: x.exp().exp()) == 8000
    assert activation_bytes(lambda: [x.exp(), x.exp()]) == 8000


def test_tensors_that_share_memory_count_once() -> None:
    x = leaf(1000)
    assert activation_bytes(lambda: x.exp().relu_()) == 4000
    shared = torch.ones(1000)
    assert activation_bytes(lambda: [x * shared, x[:10] * shared[:10]]) == 4000


def test_the_most_at_one_time_counts_not_the_sum() -> None:
    x = leaf(1000)
    assert activation_bytes(lambda: [x.exp().sum().backward() for _ in range(3)]) == 4000

    def small_after_large() -> None:
        x.exp().exp().sum().backward()
        x.exp().sum().backward()

    assert activation_bytes(small_after_large) == 8000


def test_parameters_do_not_count() -> None:
    linear = nn.Linear(100, 50)
    assert activation_bytes(lambda: linear(torch.zeros(3, 100))) == 3 * 100 * 4
    assert activation_bytes(lambda: linear(torch.zeros(3, 100, requires_grad=True))) == 3 * 100 * 4


def test_the_count_is_that_of_the_layers_and_the_same_without_data() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(144, 5),
    )
    images, convolved, normalised, statistics = 2 * 3 * 64, 2 * 4 * 36, 2 * 4 * 36, 2 * 4 + 2 * 4
    expected = 4 * (
        images + convolved + normalised + statistics
    )  # running and batch statistics, mean and variance
    assert activation_bytes(lambda: network(torch.zeros(2, 3, 8, 8))) == expected
    network.to("meta")
    assert (
        activation_bytes(lambda: network(torch.zeros(2, 3, 8, 8, device="meta")).sum().backward())
        == expected
    )


def test_counting_leaves_results_as_they_are() -> None:
    x = torch.randn(5, requires_grad=True)
    activation_bytes(lambda: x.exp().sum().backward())
    assert torch.equal(x.grad, x.detach().exp())


class Steps:
    """Steps that need `fixed` + `each` x size bytes; remembers which sizes were run."""

    def __init__(self, each: int, fixed: int = 0, crash_above: float = float("inf")) -> None:
        self.each, self.fixed, self.crash_above = each, fixed, crash_above
        self.run: list[int] = []

    def __call__(self, size: int) -> None:
        self.run.append(size)
        if size > self.crash_above:
            raise torch.OutOfMemoryError("out of memory")

    def needs(self, size: int) -> int:
        return self.each * size + self.fixed


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Calls largest_batch_size with steps whose need is known, in so many bytes."""

    def call(
        steps: Steps,
        memory_bytes: int,
        limit: int,
        multiple_of: int,
        device: torch.device,
        share: float = 1.0,
    ) -> int:
        def measured(step: Callable[[int], None], size: int, device: torch.device) -> int:
            step(size)
            return steps.needs(size)

        monkeypatch.setattr(memory, "_bytes_of", measured)
        monkeypatch.setattr(memory, "available_memory", lambda device: memory_bytes)
        return largest_batch_size(
            steps, limit=limit, multiple_of=multiple_of, device=device, share=share
        )

    return call


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("multiple_of", [1, 3, 8, 100])
@pytest.mark.parametrize("limit", [100, 1000, 10**6])
@pytest.mark.parametrize("memory_bytes", [11_000, 64_000, 64_500, 123_456_789])
def test_the_largest_size_that_fits_is_found(
    search: Callable[..., int],
    device: torch.device,
    multiple_of: int,
    limit: int,
    memory_bytes: int,
) -> None:
    steps = Steps(each=100, fixed=500)
    found = search(steps, memory_bytes, limit, multiple_of, device)
    fitting = [
        multiple_of * 2**k
        for k in range(30)
        if multiple_of * 2**k <= limit and 100 * multiple_of * 2**k + 500 <= memory_bytes
    ]
    assert found == max(fitting)
    assert all(100 * size + 500 <= memory_bytes for size in steps.run[1:])
    assert len(steps.run) <= 2 or device is CUDA


def test_only_the_given_share_is_used(search: Callable[..., int]) -> None:
    assert search(Steps(1000), 64_000, 10**6, 1, CUDA) == 64
    assert search(Steps(1000), 64_000, 10**6, 1, CUDA, share=0.9) == 32


def test_a_step_that_runs_out_of_memory_ends_the_search(search: Callable[..., int]) -> None:
    steps = Steps(1, crash_above=200)
    assert search(steps, 10**9, 10**6, 8, CUDA) == 128
    assert steps.run == [8, 16, 32, 64, 128, 256]


def test_of_several_processes_one_that_runs_out_of_memory_says_so(
    search: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait in the step's collectives, and would for ten minutes."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda number: [number] * 2)
    with pytest.raises(
        ValueError,
        match=r"a trial step of 256 images per process ran out of .* give a batch_size below 512",
    ):
        search(Steps(1, crash_above=200), 10**9, 10**6, 8, CUDA)


def test_tiny_batches_are_not_run_where_larger_ones_are_of_use(search: Callable[..., int]) -> None:
    steps = Steps(1)
    search(steps, 10**9, 100, 1, CUDA)
    assert steps.run[0] == 8
    steps = Steps(1)
    assert search(steps, 10**9, 6, 1, CUDA) == 4
    assert steps.run == [4]


@pytest.mark.parametrize("crash_above", [0, float("inf")])
def test_what_cannot_fit_is_refused(search: Callable[..., int], crash_above: float) -> None:
    with pytest.raises(
        ValueError, match=r"not even 12 images fit into the 0\.90 GiB that a step may use on cuda"
    ):
        search(Steps(2**30, crash_above=crash_above), 2**30, 100, 12, CUDA, share=0.9)
    with pytest.raises(
        ValueError, match="batch_size=auto needs at least 12 images per process, there are 11"
    ):
        search(Steps(1), 10**9, 11, 12, CUDA)


def test_on_the_cpu_two_small_steps_tell_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(1000, 1000), nn.Tanh())
    sizes: list[int] = []

    def step(size: int) -> None:
        sizes.append(size)
        network(torch.zeros(size, 1000)).sum().backward()

    # 8000 bytes an image: its input and its result.
    monkeypatch.setattr(
        memory, "available_memory", lambda device: round(memory.CPU_OVERHEAD * 8000 * 5000)
    )
    assert largest_batch_size(step, limit=10**9, multiple_of=2, device=CPU) == 4096
    assert sizes == [8, 16]


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for /proc and /sys/fs/cgroup.

    1000 kB are free; the process is in the group /job/step, without limits.
    """
    (tmp_path / "meminfo").write_text(
        "MemTotal:     2000 kB\nMemFree:        10 kB\n"
        "MemAvailable:   1000 kB\nHugePages_Total:   0\n"
    )
    (tmp_path / "cgroup").write_text("4:memory:/old\n0::/job/step\n")
    (tmp_path / "groups" / "job" / "step").mkdir(parents=True)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    return tmp_path


def limit_group(folder: Path, limit: str, used: int, cached: int = 0) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nslab 1\n")


def test_the_memory_of_the_cpu_is_what_the_machine_has_left(system: Path) -> None:
    assert available_memory(CPU) == 1000 * 1024
    limit_group(system / "groups" / "job", "max", 10**9)
    assert available_memory(CPU) == 1000 * 1024
    limit_group(system / "groups" / "job", str(10**12), 10**9)
    assert available_memory(CPU) == 1000 * 1024


def test_the_tightest_control_group_counts(system: Path) -> None:
    limit_group(system / "groups" / "job" / "step", "9000", 1000)
    assert available_memory(CPU) == 8000
    limit_group(system / "groups" / "job", "5000", 1000)
    assert available_memory(CPU) == 4000
    limit_group(system / "groups", "3000", 1000)
    assert available_memory(CPU) == 2000


def test_cached_files_are_no_used_memory(system: Path) -> None:
    limit_group(system / "groups" / "job", "5000", 4900, cached=4000)
    assert available_memory(CPU) == 4100


def test_a_system_that_does_not_say_is_refused(system: Path) -> None:
    (system / "meminfo").unlink()
    with pytest.raises(ValueError, match="give batch_size as a number"):
        available_memory(CPU)


def test_this_machine_has_memory() -> None:
    assert 2**20 < available_memory(CPU) < 2**50


@pytest.mark.gpu
def test_on_a_gpu_the_peak_of_each_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 2**30)
    sizes: list[int] = []

    def step(size: int) -> None:
        sizes.append(size)
        torch.empty(size * 2**20, dtype=torch.uint8, device="cuda")

    assert largest_batch_size(step, limit=10**9, multiple_of=1, device=CUDA) == 512
    assert sizes == [8, 16, 32, 64, 128, 256, 512]


@pytest.mark.gpu
def test_memory_that_torch_holds_unused_is_available() -> None:
    torch.cuda.empty_cache()
    before = available_memory(CUDA)
    block = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert before - available_memory(CUDA) >= 2**28
    del block
    assert abs(before - available_memory(CUDA)) < 2**26
