"""The loop that trains every method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from seed_exp.base.average_names import average_of
from seed_exp.base.slurm import note_restart
from seed_exp.base.stopping import Stopped
from seed_exp.config.schema import FitConfig, Resume
from seed_exp.data.loader import load_batches
from seed_exp.data.order import SampleOrder
from seed_exp.data.sources import Source
from seed_exp.engine import distributed
from seed_exp.engine.averages import Averages, warn_of_average
from seed_exp.engine.checkpoint import CheckpointWriter, load_checkpoint, newest_checkpoint
from seed_exp.engine.fleet import Fleet, find_batch_size
from seed_exp.engine.health import Health
from seed_exp.engine.method import Method
from seed_exp.engine.optimizers import warn_of_rate, warn_of_schedule
from seed_exp.engine.progress import Progress
from seed_exp.engine.run import Run
from seed_exp.engine.schedules import peak_lr
from seed_exp.engine.signals import StopRequest
from seed_exp.views.recipe import HostBatch, Views

log = logging.getLogger("seed_exp")


class Fitted(NamedTuple):
    """What came of a training."""

    diverged: dict[str, int]
    """The networks that diverged, and after which step that was found."""
    batch_size: int
    """Images per optimiser step over all processes; for `auto` the size that was found."""


def fit(
    method: Method,
    source: Source,
    views: Views,
    run: Run[Any],
    *,
    evaluate: Callable[[Collection[str]], Mapping[str, float]],
    on_checkpoint: Callable[[Mapping[str, int], Mapping[str, dict[str, Tensor]], int], None],
    epochs: Mapping[str, int] | None = None,
    lrs: Mapping[str, float] | None = None,
    averages: Averages[Any] | None = None,
) -> Fitted:
    """Trains `method.trainable` in place, from the start or from where the run folder is.

    A network whose loss stops being finite is trained no further; the others go on as if they were
    alone.

    Args:
        method: What to train.
        source: Training images.
        views: Their views.
        run: Folder, tracker, device, workers; its options say how long, in what batches and at what
            intervals to train, and name optimiser and schedule, the same for every network.
        evaluate: Called every `eval_every` epochs and at the end, with the names of the networks
            that have not diverged; what it returns is logged. A number that is not finite, called
            `<network>/...`, says that this network has diverged.
        on_checkpoint: Called on rank 0, in another thread, before a checkpoint is written: with the
            steps that each network which has not diverged was trained for, copies of all networks'
            tensors, and the batch size. Averages are among the networks, as NAME_ema.
        epochs: By network, how long it is trained where that is shorter than the run's epochs.
        lrs: Learning rate by network (at a batch of 256) where it is not the optimizer's.
        averages: Averages of the networks, which follow them.

    Raises:
        ValueError: the batch size does not fit the data or the processes, no network's loss is
            finite any more, or the folder holds what `resume` rules out.
        Stopped: a signal asked for it (engine.signals); a checkpoint is written.
    """
    config: FitConfig = run.config
    folder, device, tracker = run.folder, run.device, run.tracker
    # 1. Where it goes on: after the newest checkpoint of the run folder, if there is one.
    state = _state_to_resume(folder, config.resume)
    first_step = state["step"] if state else 0
    if len(set(first_steps := distributed.gather_objects(first_step))) > 1:
        raise ValueError(
            f"not every process can read the newest checkpoint of {folder}: they would go on after "
            f"steps {first_steps}; "
            "see that all of them reach the folder, and type the same command again"
        )
    if state is not None:
        batch_size: int = state["batch_size"]
    elif isinstance(config.batch_size, int):
        batch_size = config.batch_size
    else:
        batch_size = find_batch_size(method, views, config, device, len(source))
        log.info("batch_size=%d fits into the memory", batch_size)

    # 2. How long: everything below is a function of the step.
    order = SampleOrder(
        len(source), batch_size, config.seed, distributed.rank(), distributed.world_size()
    )
    run_epochs = {name: (epochs or {}).get(name, config.epochs) for name in method.trainable}
    lengths = {
        name: config.steps or num * order.steps_per_epoch for name, num in run_epochs.items()
    }
    num_steps = max(lengths.values())
    eval_steps = round(config.eval_every * order.steps_per_epoch)
    if order.batch_size_per_rank % config.accumulation:
        raise ValueError(
            f"accumulation={config.accumulation} does not divide the {order.batch_size_per_rank} "
            "images of each process"
        )
    if order.batch_size_per_rank // config.accumulation % views.images_together:
        raise ValueError(
            f"views.mixup=true mixes images in pairs, but batch_size={batch_size} leaves "
            f"{order.batch_size_per_rank // config.accumulation} images to each of "
            f"{distributed.world_size()} processes x accumulation={config.accumulation} parts; "
            "choose a batch_size that leaves an even number"
        )
    warn_of_schedule(config.optimizer, min(lengths.values()) / order.steps_per_epoch)
    if averages is not None:
        warn_of_average(averages.decay, min(lengths.values()))
    warn_of_rate(config.optimizer, max((lrs or {"": config.optimizer.lr}).values()), batch_size)

    # 3. What is trained.
    fleet = Fleet(
        method,
        views,
        config,
        device,
        batch_size=batch_size,
        steps_per_epoch=order.steps_per_epoch,
        num_steps=lengths,
        lrs=lrs,
        averages=averages,
    )
    longest = max(lengths, key=lengths.__getitem__)
    health = Health(fleet, folder, config.max_skipped)
    if state is not None:
        fleet.load(state)
        health.load(state["health"], device)
        log.info("resuming after step %d of %d", first_step, num_steps)
    if (
        distributed.rank() == 0 and first_step < num_steps
    ):  # otherwise the job was at an evaluation, which has its own folder
        note_restart(folder, first_step)
    tracker.rewind(state["tracker"] if state else {})

    # 4. The loop.
    kept_steps = (config.keep_every or 0) * order.steps_per_epoch
    barrier = distributed.Barrier()

    def is_kept(steps_done: int) -> bool:
        return kept_steps > 0 and steps_done % kept_steps == 0

    def evaluate_and_log(steps_done: int) -> None:
        copies = {} if averages is None else averages.networks
        for network in (*method.trainable.values(), *copies.values()):
            distributed.broadcast_buffers(network)
        results = evaluate([name for name in method.trainable if name not in fleet.diverged])
        barrier.wait()  # rank 0 measures alone what all have computed
        if results := health.evaluated(results, steps_done):
            tracker.log(steps_done, results)
            log.info(
                "step %d: %s",
                steps_done,
                ", ".join(f"{key} {value:.2f}" for key, value in results.items()),
            )
        for network in method.trainable.values():
            network.train()

    def save(steps_done: int, *, evaluated: bool) -> None:
        health.check_divergence(steps_done)
        position = {
            "step": steps_done,
            "batch_size": batch_size,
            "evaluated": evaluated,
            "health": health.state(),
        }
        trained = {
            name: min(num, steps_done)
            for name, num in lengths.items()
            if name not in fleet.diverged
        }
        writer.submit(
            {**position, "trained": trained, "tracker": tracker.position(), **fleet.state()}
        )
        barrier.wait()  # rank 0 may have waited for the disk

    def size_in(step: int) -> int:
        return views.size_at(step // order.steps_per_epoch if config.steps is None else step)

    remaining = range(first_step, num_steps)
    progress = Progress(first_step, num_steps, batch_size)
    fetched = load_batches(
        source,
        views,
        ((epoch, method.rows(epoch, images)) for epoch, images in map(order.batch, remaining)),
        num_workers=run.num_workers,
        device=device,
        on_bad=None if run.bad_samples is None else run.bad_samples(source),
        waiting=progress.waiting,
        shapes=(partial(HostBatch.of_size, size=size_in(step)) for step in remaining),
    )

    def write_others(state: dict[str, Any]) -> None:
        tracker.sync()
        steps, networks = dict(state["trained"]), dict(state["networks"])
        for name, average in state.get("averages", {}).items():
            networks[average_of(name)] = average
            if name in state["trained"]:
                steps[average_of(name)] = steps[name]
        on_checkpoint(steps, networks, batch_size)

    writer = CheckpointWriter(folder, keep=is_kept, before_write=write_others)
    steps_done, finished = first_step, False
    with (
        closing(fetched) as batches,
        closing(progress),
        StopRequest() as stop_request,
    ):
        try:
            if state is not None and not state["evaluated"]:
                with stop_request.raising_at_once():
                    evaluate_and_log(first_step)
                if not remaining:
                    save(first_step, evaluated=True)
            for step in remaining:
                batch = next(batches)
                steps_done = step + 1
                last = steps_done == num_steps
                log_now = last or steps_done % config.log_every == 0
                evaluate_now = last or (eval_steps > 0 and steps_done % eval_steps == 0)
                outcome = fleet.step(batch, step, measure=log_now)
                health.add(step, batch.indices, outcome.means, outcome.skipped)
                progress.update()

                # 5. What is seen and kept of it.
                if log_now:
                    warmed_up = steps_done > config.optimizer.warmup_epochs * order.steps_per_epoch
                    shown = health.close(outcome.measured, steps_done, warmed_up=warmed_up)
                    if advice := method.advice(
                        shown, num_seen=steps_done * batch_size, num_images=len(source)
                    ):
                        log.warning("step %d: %s", steps_done, advice)
                    lr = peak_lr(config.optimizer.lr, batch_size) * fleet.lr_factor(longest, step)
                    tracker.log(
                        steps_done,
                        {
                            "epoch": steps_done / order.steps_per_epoch,
                            "lr": lr,
                            **({"view_size": size_in(step)} if len(views.global_sizes) > 1 else {}),
                            **shown,
                        },
                    )
                    speed = progress.measure(steps_done)
                    tracker.log_speed(steps_done, speed)
                    progress.report(
                        steps_done,
                        {key: value for key, value in shown.items() if key.endswith("/loss")},
                        speed,
                    )
                stop_now = stop_request.agreed_signal()
                with progress.paused():
                    # Before the evaluation, whose failure must not cost what has been trained.
                    if (
                        evaluate_now
                        or stop_now
                        or is_kept(steps_done)
                        or steps_done % config.checkpoint_every == 0
                    ):
                        save(steps_done, evaluated=not evaluate_now)
                    if stop_now:
                        raise Stopped(stop_now)
                    if evaluate_now:
                        with stop_request.raising_at_once():
                            evaluate_and_log(steps_done)
                    if last:
                        save(steps_done, evaluated=True)
            finished = True
        except Stopped as stopped:
            if writer.close(finished=False):
                log.warning(
                    "stopped after step %d of %d; the same command goes on from there",
                    steps_done,
                    num_steps,
                )
            stopped.folder, stopped.step = folder, steps_done
            raise
        finally:
            writer.close(finished=finished)
    barrier.wait()  # rank 0 has waited until the last checkpoint was on disk
    if stop_request.received:  # too late to stop a step; what follows must not begin
        raise Stopped(stop_request.received, folder, num_steps)
    return Fitted(fleet.diverged, batch_size)


def _state_to_resume(folder: Path, resume: Resume) -> dict[str, Any] | None:
    """The state of the newest checkpoint; None where there is none."""
    newest = newest_checkpoint(folder)
    if resume is Resume.never and newest is not None:
        raise ValueError(
            f"resume=never, but {folder} holds {newest.name}; leave resume out to go on, or choose "
            "another run_dir"
        )
    if resume is Resume.must and newest is None:
        raise ValueError(
            f"resume=must, but {folder} holds no checkpoint; check run_dir and options, or leave "
            "resume out"
        )
    if newest is None and (folder / "done.json").exists():
        raise ValueError(
            f"{folder} was finished, but its checkpoints are gone: training would begin anew and "
            "replace the students; "
            "remove done.json if it shall, or choose another run_dir"
        )
    return load_checkpoint(folder)
