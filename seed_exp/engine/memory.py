"""Memory: how much there is, how much a step needs, and the largest batch that fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_exp.engine import distributed

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
SMALLEST_BATCH = 8
"""Images with which the search begins.

Smaller batches say little about larger ones, and batch norm refuses a single value.
"""
CPU_OVERHEAD = 1.5
"""Peak memory of a step divided by the memory that autograd held.

Up to 1.42 was seen (ResNet-18 at 224 px; gradients, work space).
"""


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on the device.

    On a GPU these are the free ones and those that torch holds unused. On the CPU they are what the
    machine has, or the tightest of the control groups (v2) that the process is in.

    Raises:
        ValueError: the system does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not MEMINFO.exists():
        raise ValueError(
            f"there is no {MEMINFO} to read the free memory from; give batch_size as a number"
        )
    entries = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    return min([int(entries["MemAvailable"].removesuffix("kB")) * 1024, *_left_in_cgroups()])


def _left_in_cgroups() -> list[int]:
    """Bytes left in every control group above this process that has a limit."""
    own = [
        line.removeprefix("0::/")
        for line in CGROUP.read_text().splitlines()
        if line.startswith("0::/")
    ]
    left = []
    for name in own:
        for folder in [CGROUPS / name, *(CGROUPS / name).parents]:
            limit = folder / "memory.max"
            if limit.exists() and limit.read_text().strip() != "max":
                # Cached files count as used, but make room when it is needed.
                statistics = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                )
                used = int((folder / "memory.current").read_text()) - int(
                    statistics["inactive_file"]
                )
                left.append(max(0, int(limit.read_text()) - used))
    return left


def activation_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that autograd holds at one time for backward passes while `function()` runs.

    Tensors that share memory count once, parameters do not count. The result depends on shapes and
    formats alone, so a network on the meta device gives it without computing anything.
    """
    ledger = _Ledger()
    with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda saved: saved.tensor):
        function()
    return ledger.most


class _Ledger:
    """Bytes that saved tensors hold together, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.users: Counter[int] = Counter()

    def pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor, self)


class _Saved:
    """A saved tensor that is in the ledger for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor, ledger: _Ledger) -> None:
        self.tensor = tensor
        self.ledger = ledger
        storage = tensor.untyped_storage()
        parameter = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        self.storage, self.num_bytes = storage._cdata, 0 if parameter else storage.nbytes()
        if not ledger.users[self.storage]:
            ledger.now += self.num_bytes
            ledger.most = max(ledger.most, ledger.now)
        ledger.users[self.storage] += 1

    def __del__(self) -> None:
        self.ledger.users[self.storage] -= 1
        if not self.ledger.users[self.storage]:
            self.ledger.now -= self.num_bytes


def largest_batch_size(
    step: Callable[[int], None],
    *,
    limit: int,
    multiple_of: int,
    device: torch.device,
    share: float = 0.9,
) -> int:
    """The largest of multiple_of x 1, 2, 4, ... images whose step fits into the memory left.

    On a GPU, larger and larger steps are run until one does not fit, or would not, judging by the
    growth so far. On the CPU, where asking for too much ends the process, two small steps are run
    and all else is extrapolated from what autograd saved.

    Args:
        step: Runs the forward and backward passes on so many images; leaves no gradients behind.
        limit: Largest size that makes sense, in images.
        multiple_of: Smallest size, of which the result is a multiple, in images.
        device: Device of the step.
        share: Part of the available memory that a step may use; the rest is for what one step alone
            does not show.

    Raises:
        ValueError: `limit` is below `multiple_of`, not even the smallest step fits, or one of
            several processes has no memory for a step that the others are in.
    """
    sizes = [
        multiple_of << doublings
        for doublings in range(limit.bit_length())
        if multiple_of << doublings <= limit
    ]
    if not sizes:
        raise ValueError(
            f"batch_size=auto needs at least {multiple_of} images per process, there are {limit}"
        )
    sizes = [size for size in sizes if size >= SMALLEST_BATCH] or sizes[-1:]
    # Steps are collective: all try the same sizes.
    budget = share * min(distributed.gather_objects(available_memory(device)))
    largest, needed, growth = 0, 0.0, 0.0
    for number, size in enumerate(sizes):
        before, needed = needed, needed + growth * (size - largest)
        if needed <= budget and (device.type == "cuda" or number < 2):
            try:
                needed = _bytes_of(step, size, device)
            except torch.OutOfMemoryError:
                if distributed.world_size() > 1:  # the others wait in the step's collectives
                    raise ValueError(
                        f"a trial step of {size} images per process ran out of this process's "
                        "memory; instead of auto, give a batch_size below "
                        f"{size * distributed.world_size()}"
                    ) from None
                break
            growth = (needed - before) / (size - largest)
        if needed > budget:
            break
        largest = size
    if largest == 0:
        raise ValueError(
            f"not even {sizes[0]} images fit into the {budget / 2**30:.2f} GiB that a step may use "
            f"on {device}; train fewer or smaller students, or use smaller or fewer views"
        )
    return largest


def _bytes_of(step: Callable[[int], None], size: int, device: torch.device) -> int:
    if device.type != "cuda":
        return round(CPU_OVERHEAD * activation_bytes(lambda: step(size)))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(size)
    return torch.cuda.max_memory_allocated(device) - before
