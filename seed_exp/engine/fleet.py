"""The networks that a method trains, with their optimisers, and the step that trains them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from seed_exp.config.schema import BenchConfig, FitConfig
from seed_exp.data.transfer import moved
from seed_exp.engine import distributed
from seed_exp.engine.averages import Averages
from seed_exp.engine.memory import largest_batch_size
from seed_exp.engine.method import Method
from seed_exp.engine.optimizers import build_optimizer, set_lr, step_unless
from seed_exp.engine.precision import autocast
from seed_exp.engine.schedules import lr_factor, peak_lr
from seed_exp.views.recipe import HostBatch, Views


class Outcome(NamedTuple):
    """Numbers that a step leaves, on the device."""

    means: dict[str, Tensor]
    """Each network's scalars, means over the batch, by <name>/<key>; 0 where it was not updated."""
    skipped: dict[str, Tensor]
    """By network, whether it was not updated because its gradient was not finite: bool []."""
    measured: dict[str, Tensor]
    """Gradient norms before clipping, and the method's diagnostics.

    Where the batch is split, the diagnostics are those of its last part.
    """


class Fleet:
    """A method's networks, replicated over the processes. No network influences another.

    Args:
        method: What to train, in place.
        views: The views of its images.
        config: Accumulation, precision, optimiser and schedule, the same for every network.
        device: Device of the training.
        batch_size: Images per step over all processes; the learning rate is proportional to it.
        steps_per_epoch: Steps per epoch, for the schedule.
        num_steps: Number of steps that each network is trained for, by name.
        lrs: Learning rate by network (at a batch of 256) where it is not `config.optimizer.lr`.
        averages: Averages of the networks, which follow them.
    """

    def __init__(
        self,
        method: Method,
        views: Views,
        config: FitConfig,
        device: torch.device,
        *,
        batch_size: int,
        steps_per_epoch: int,
        num_steps: Mapping[str, int],
        lrs: Mapping[str, float] | None = None,
        averages: Averages[Any] | None = None,
    ) -> None:
        self.method, self.config, self.device = method, config, device
        self.averages = averages
        self.steps_per_epoch, self.num_steps = steps_per_epoch, dict(num_steps)
        self.diverged: dict[str, int] = {}
        """The step after which a network was found to have diverged; it is trained no further."""
        # Channels last: convolutions are faster, on a GPU as on a CPU.
        method.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,unused-ignore]
        for network in method.trainable.values():
            network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload,unused-ignore]
        # cuDNN tries its algorithms once for each shape, and takes the fastest; which one that is
        # may differ from run to run.
        torch.backends.cudnn.benchmark = method.fixed_shapes and not config.deterministic
        self._device_half = device_half(views, config, device)
        if is_compiled(config, device):
            # All students share the code of one forward(), and each needs a graph of its own for
            # each size of views: those of global views, and that of local ones. The limit counts
            # the graphs of this process, those of earlier runs (a local sweep) included, and code
            # beyond it would run eagerly.
            torch.compiler.reset()
            graphs = 4 * (len(views.global_sizes) + 1) * len(method.trainable)
            limits = torch.compiler.config
            limits.recompile_limit = max(limits.recompile_limit, graphs)
            limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, graphs)
            method.compile_shared()
            for network in method.trainable.values():
                # Before DDP, whose reducer would break the graph; the keys stay the same.
                network.compile(dynamic=False)
        self._networks = {
            name: distributed.replicate(network, device)
            for name, network in method.trainable.items()
        }
        self._optimizers = {
            name: build_optimizer(config.optimizer, network, method.lr_factors)
            for name, network in method.trainable.items()
        }
        base_lrs = dict.fromkeys(method.trainable, config.optimizer.lr) | dict(lrs or {})
        self._peak_lrs = {name: peak_lr(lr, batch_size) for name, lr in base_lrs.items()}

    def training(self, step: int) -> list[str]:
        """The networks that take part in `step` (from 0)."""
        return [
            name for name, num in self.num_steps.items() if step < num and name not in self.diverged
        ]

    def lr_factor(self, name: str, step: int) -> float:
        """Share of its peak learning rate that the network is trained with in `step`."""
        return lr_factor(
            self.config.optimizer,
            step / self.steps_per_epoch,
            self.num_steps[name] / self.steps_per_epoch,
        )

    def lr(self, name: str, step: int) -> float:
        """Learning rate that the network is trained with in `step`."""
        return self._peak_lrs[name] * self.lr_factor(name, step)

    def step(self, batch: HostBatch, step: int, *, measure: bool) -> Outcome:
        """One optimiser step of every network that takes part. Nothing here waits for a GPU.

        A network whose gradient is not finite is left as it was, running statistics included.

        Args:
            batch: This process's images, on the device.
            step: Number of the step, from 0.
            measure: Whether to measure what is not needed for training.

        Returns:
            What there is to know of it.
        """
        names = self.training(step)
        accumulation, clip = self.config.accumulation, self.config.optimizer.clip_grad_norm
        means: dict[str, Tensor] = {}
        statistics = {name: _Statistics(self.method.trainable[name]) for name in names}
        for part, part_batch in enumerate(_parts(batch, accumulation)):
            with torch.no_grad():
                views = {
                    name: _channels_last(view)
                    for name, view in self._device_half(part_batch).items()
                }
            with autocast(self.config.precision, self.device):
                prepared = self.method.prepare(views, part_batch)
            for name in names:
                network = self._networks[name]
                # Dropout depends on these alone, not on what other networks or earlier steps drew.
                torch.manual_seed(
                    derive_seed(self.config.seed, name, step, part, distributed.rank())
                )
                with distributed.no_sync(network, skip=part + 1 < accumulation):
                    precision = self.method.formats.get(name, self.config.precision)
                    with autocast(precision, self.device):
                        scalars = self.method.loss(name, network, prepared)
                    (scalars["loss"] / accumulation).backward()  # type: ignore[no-untyped-call]
                for key, value in scalars.items():
                    term, of = value.detach().float() / accumulation, f"{name}/{key}"
                    means[of] = means[of] + term if of in means else term

        measured: dict[str, Tensor] = {}
        skipped: dict[str, Tensor] = {}
        for name in names:
            network, optimizer = self.method.trainable[name], self._optimizers[name]
            norm = get_total_norm(
                [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
            )
            if clip is not None:
                clip_grads_with_norm_(network.parameters(), clip, norm)
            skipped[name] = ~norm.isfinite()
            set_lr(optimizer, self.lr(name, step))
            step_unless(optimizer, skipped[name])
            optimizer.zero_grad(set_to_none=True)
            statistics[name].restore_where(skipped[name])
            if self.averages is not None:
                self.averages.update(name, network, skipped[name])
            for key in [key for key in means if key.startswith(f"{name}/")]:
                means[key] = torch.where(skipped[name], 0.0, means[key])
            if measure:
                measured[f"{name}/grad_norm"] = norm
        if measure:
            measured |= self.method.diagnostics(prepared)
        self.method.after_step()
        return Outcome(means, skipped, measured)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "networks": {
                name: network.state_dict() for name, network in self.method.trainable.items()
            },
            "optimizers": {
                name: optimizer.state_dict() for name, optimizer in self._optimizers.items()
            },
            "carried": self.method.carried.state_dict(),
            "diverged": dict(self.diverged),
            **({} if self.averages is None else {"averages": self.averages.state()}),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        for name, network in self.method.trainable.items():
            network.load_state_dict(state["networks"][name])
            self._optimizers[name].load_state_dict(state["optimizers"][name])
        self.method.carried.load_state_dict(state["carried"])
        if self.averages is not None:
            self.averages.load(state["averages"])
        self.diverged = dict(state["diverged"])


def device_half(
    views: Views, config: FitConfig | BenchConfig, device: torch.device
) -> Callable[[HostBatch], dict[str, Tensor]]:
    """`views.device`, compiled on a GPU if networks are.

    On a CPU an operation takes only the rows that it changes. Each number of rows would be a graph,
    and which of them are compiled would depend on the steps before.
    """
    if is_compiled(config, device) and device.type == "cuda":
        return torch.compile(views.device, dynamic=False)
    return views.device


def is_compiled(config: FitConfig | BenchConfig, device: torch.device) -> bool:
    """Whether networks and views are compiled; without an option for it, on a GPU."""
    return device.type == "cuda" if config.compile is None else config.compile


def find_batch_size(
    method: Method, views: Views, config: FitConfig, device: torch.device, num_images: int
) -> int:
    """The largest batch over all processes whose parts fit into each process's memory.

    Tries steps of a copy of the method.

    Raises:
        ValueError: not even the smallest fits.
    """
    eager = replace(config, compile=False)
    num_steps = dict.fromkeys(method.trainable, 1)
    fleet = Fleet(
        method.rehearsal(),
        views,
        eager,
        device,
        batch_size=1,
        steps_per_epoch=1,
        num_steps=num_steps,
    )
    torch.backends.cudnn.benchmark = False  # its trials would count as the step's memory

    def step(size: int) -> None:
        batch = views.empty(size * method.rows_per_image).map(torch.zeros_like)
        fleet.step(moved(batch, device), 0, measure=False)

    limit = num_images // distributed.world_size()
    smallest = config.accumulation * views.images_together
    size = largest_batch_size(step, limit=limit, multiple_of=smallest, device=device)
    return min(distributed.gather_objects(size)) * distributed.world_size()


class _Statistics:
    """A network's buffers as they are now, such as running statistics, to go back to.

    All buffers of a dtype are handled at once: a kernel for each would take longer to start than to
    run.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._before = {dtype: _joined(same) for dtype, same in _by_dtype(network.buffers())}

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Gives the buffers these values if `condition` (bool []) is true, in place."""
        for dtype, buffers in _by_dtype(self._network.buffers()):
            chosen = torch.where(condition, self._before[dtype], _joined(buffers))
            parts = torch.split(chosen, [buffer.numel() for buffer in buffers])
            torch._foreach_copy_(
                buffers, [part.view(own.shape) for part, own in zip(parts, buffers, strict=True)]
            )


def _by_dtype(tensors: Iterable[Tensor]) -> Iterable[tuple[torch.dtype, list[Tensor]]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return groups.items()


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def _channels_last(views: Tensor) -> Tensor:
    """Views [V, N, 3, S, S] with this memory format in each view."""
    flat = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return flat.view(views.shape)


def _parts(batch: HostBatch, num: int) -> Iterator[HostBatch]:
    """The batch in `num` equal, contiguous parts."""
    size = len(batch.labels) // num
    for start in range(0, len(batch.labels), size):
        yield batch.map(itemgetter(slice(start, start + size)))
