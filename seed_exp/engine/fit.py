"""The loop that trains every method."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from seed_exp.config.schema import FitConfig, OptimizerConfig, ScheduleName
from seed_exp.data.loader import SampleOrder, load_batches
from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.engine.checkpoint import load_checkpoint, save_checkpoint
from seed_exp.engine.optimizers import build_optimizer, set_lr
from seed_exp.engine.precision import autocast
from seed_exp.engine.progress import Progress
from seed_exp.engine.schedules import lr_factor, peak_lr
from seed_exp.engine.tracking import Tracker
from seed_exp.views.recipe import HostBatch, TrainViews

log = logging.getLogger("seed_exp")


class Method(Protocol):
    """What `fit` trains: a fleet of networks that share a batch and whatever is computed of it once."""

    trainable: dict[str, nn.Module]
    """The networks, by name; each has its own loss, gradient and optimiser."""
    carried: nn.Module
    """What else goes from step to step (queues, momentum encoders) and hence into checkpoints."""

    def to(self, device: torch.device) -> Any:
        """Moves all but `trainable`."""

    def prepare(self, views: dict[str, Tensor], labels: Tensor) -> Any:
        """What all networks share of (a part of) a batch; views [V, N, 3, S, S] per resolution, labels [N]."""

    def loss(self, name: str, network: nn.Module, prepared: Any) -> dict[str, Tensor]:
        """One network's scalars: "loss", which is minimised, and others, which are logged."""

    def diagnostics(self, prepared: Any) -> dict[str, Tensor]:
        """Scalars worth knowing now and then."""

    def after_step(self) -> None:
        """Called when every optimiser has made its step."""


def fit(
    method: Method,
    source: Source,
    views: TrainViews,
    config: FitConfig,
    *,
    folder: Path,
    tracker: Tracker,
    device: torch.device,
    num_workers: int,
    evaluate: Callable[[], Mapping[str, float]],
    on_checkpoint: Callable[[int], None],
    lrs: Mapping[str, float] | None = None,
) -> None:
    """Trains `method.trainable` in place, resuming from the run folder where it was.

    Args:
        method: What to train.
        source: Training images.
        views: Their views.
        config: Length, batch size, intervals; optimiser and schedule, the same for every network.
        folder: Run folder, for checkpoints.
        tracker: Where metrics go.
        device: Where the networks are.
        num_workers: Processes that prepare views.
        evaluate: Called every `config.eval_every` epochs and at the end; what it returns is logged.
        on_checkpoint: Called on every rank, with the steps done, whenever a checkpoint is about to be written.
        lrs: Learning rate by network (at a batch of 256) where it is not `config.optimizer.lr`.

    Raises:
        ValueError: the batch size does not fit the data or the processes, or a loss is not finite.
    """
    # 1. How long: everything below is a function of the step.
    order = SampleOrder(len(source), config.batch_size, config.seed, distributed.rank(), distributed.world_size())
    num_steps = config.steps or config.epochs * order.steps_per_epoch
    eval_steps = round(config.eval_every * order.steps_per_epoch)
    if order.batch_size_per_rank % config.accumulation:
        raise ValueError(
            f"accumulation={config.accumulation} does not divide the {order.batch_size_per_rank} images of each process"
        )

    _warn_of_schedule(config.optimizer, num_steps / order.steps_per_epoch)

    # 2. What is trained.
    method.to(device)
    for network in method.trainable.values():
        network.to(device).train()
    networks = {name: distributed.replicate(network, device) for name, network in method.trainable.items()}
    optimizers = {name: build_optimizer(config.optimizer, network) for name, network in method.trainable.items()}
    base_lrs = {name: peak_lr((lrs or {}).get(name, config.optimizer.lr), config.batch_size) for name in networks}
    interval = _Interval()

    # 3. Where it goes on: after the newest checkpoint of the run folder, if there is one.
    first_step = 0
    state = load_checkpoint(folder)
    if state is not None:
        first_step = state["step"]
        for name, network in method.trainable.items():
            network.load_state_dict(state["networks"][name])
            optimizers[name].load_state_dict(state["optimizers"][name])
        method.carried.load_state_dict(state["carried"])
        interval.load(state["interval"], device)
        log.info("resuming after step %d of %d", first_step, num_steps)
    tracker.rewind(state["tracker"] if state else {})

    # 4. The loop.
    remaining = range(first_step, num_steps)
    fetched = load_batches(
        source, views.host, map(order.batch, remaining), num_workers=num_workers, pin_memory=device.type == "cuda"
    )
    with closing(fetched) as batches, closing(Progress(first_step, num_steps, config.batch_size)) as progress:
        for step in remaining:
            with progress.waiting():
                batch = next(batches)
            steps_done = step + 1
            last = steps_done == num_steps
            log_now = last or steps_done % config.log_every == 0
            extra: dict[str, Tensor] = {}

            for part, part_batch in enumerate(_parts(batch, config.accumulation, device)):
                with torch.no_grad():
                    part_views = views.device(part_batch)
                with autocast(config.precision, device):
                    prepared = method.prepare(part_views, part_batch.labels)
                for name, network in networks.items():
                    # Dropout depends on these alone, not on what other students or earlier steps drew.
                    torch.manual_seed(derive_seed(config.seed, name, step, part, distributed.rank()))
                    with distributed.no_sync(network, skip=part + 1 < config.accumulation):
                        with autocast(config.precision, device):
                            scalars = method.loss(name, network, prepared)
                        (scalars["loss"] / config.accumulation).backward()  # type: ignore[no-untyped-call]
                    interval.add(name, scalars, 1 / config.accumulation)

            factor = lr_factor(config.optimizer, step / order.steps_per_epoch, num_steps / order.steps_per_epoch)
            for name, network in method.trainable.items():
                if log_now or config.optimizer.clip_grad_norm is not None:
                    extra[f"{name}/grad_norm"] = clip_grad_norm_(
                        network.parameters(), config.optimizer.clip_grad_norm or math.inf
                    )
                set_lr(optimizers[name], base_lrs[name] * factor)
                optimizers[name].step()
                optimizers[name].zero_grad(set_to_none=True)
            if log_now:
                extra |= method.diagnostics(prepared)
            method.after_step()
            interval.num_steps += 1
            progress.update()

            # 5. What is seen and kept of it.
            if log_now:
                means = interval.close(extra)
                _refuse_non_finite(means, steps_done)
                lr = peak_lr(config.optimizer.lr, config.batch_size) * factor
                tracker.log(steps_done, {"epoch": steps_done / order.steps_per_epoch, "lr": lr, **means})
                speed = progress.measure(steps_done)
                tracker.log_speed(steps_done, speed)
                progress.report(steps_done, {key: means[key] for key in means if key.endswith("/loss")}, speed)
            with progress.paused():
                try:
                    if last or (eval_steps and steps_done % eval_steps == 0):
                        for network in method.trainable.values():
                            distributed.broadcast_buffers(network)
                        if results := evaluate():
                            tracker.log(steps_done, results)
                            shown = ", ".join(f"{key} {value:.2f}" for key, value in results.items())
                            log.info("step %d: %s", steps_done, shown)
                        for network in method.trainable.values():
                            network.train()
                finally:  # what an evaluation cannot do must not cost what has been trained
                    if last or steps_done % config.checkpoint_every == 0:
                        carried_sums = interval.state()
                        _refuse_non_finite({key: total.item() for key, total in carried_sums["sums"].items()}, steps_done)
                        on_checkpoint(steps_done)
                        state = {
                            "step": steps_done,
                            "networks": {name: network.state_dict() for name, network in method.trainable.items()},
                            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
                            "carried": method.carried.state_dict(),
                            "interval": carried_sums,
                            "tracker": tracker.position(),
                        }
                        save_checkpoint(folder, steps_done, state)


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def _warn_of_schedule(config: OptimizerConfig, num_epochs: float) -> None:
    if config.warmup_epochs >= num_epochs:
        log.warning(
            "the learning rate rises for %g epochs, but the run ends after %.2g: it never reaches its peak; "
            "see optimizer.warmup_epochs",
            config.warmup_epochs,
            num_epochs,
        )
    late = [milestone for milestone in config.milestones if milestone >= num_epochs]
    if config.schedule is ScheduleName.step and late:
        log.warning("optimizer.milestones %s lie beyond the end of the run after %.3g epochs", late, num_epochs)


def _parts(batch: HostBatch, num: int, device: torch.device) -> Iterator[HostBatch]:
    """The batch in `num` equal, contiguous parts, each moved to the device when its turn comes."""
    size = len(batch.labels) // num
    for start in range(0, len(batch.labels), size):
        rows = slice(start, start + size)
        yield HostBatch(
            {name: tensor[rows].to(device, non_blocking=True) for name, tensor in batch.views.items()},
            {name: tensor[rows].to(device, non_blocking=True) for name, tensor in batch.draws.items()},
            batch.labels[rows].to(device, non_blocking=True),
            batch.indices[rows].to(device, non_blocking=True),
        )


class _Interval:
    """Means over the steps since the last log line, summed on the device: nothing waits for a GPU until `close`."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, network: str, scalars: Mapping[str, Tensor], weight: float) -> None:
        for key, value in scalars.items():
            name, term = f"{network}/{key}", value.detach().float() * weight
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def close(self, extra: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over steps and ranks, and over ranks of `extra`; the next interval begins."""
        values = {name: total / self.num_steps for name, total in self._sums.items()} | dict(extra)
        means = distributed.mean(torch.stack([value.float() for value in values.values()])).tolist()
        self.num_steps, self._sums = 0, {}
        return dict(zip(values, means, strict=True))

    def state(self) -> dict[str, Any]:
        """For a checkpoint, which rank 0 writes and every rank resumes from: hence all go on from the means over ranks."""
        if self._sums:
            self._sums = dict(zip(self._sums, distributed.mean(torch.stack(list(self._sums.values()))), strict=True))
        return {"num_steps": self.num_steps, "sums": self._sums}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self.num_steps = state["num_steps"]
        self._sums = {name: total.to(device) for name, total in state["sums"].items()}


def _refuse_non_finite(means: Mapping[str, float], step: int) -> None:
    wrong = [f"{name} is {value}" for name, value in means.items() if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"step {step}: {', '.join(wrong)}; lower optimizer.lr or set optimizer.clip_grad_norm=1")
