"""Times linear evaluation with a grid of learning rates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from seed_exp.benchmarks.bench_fleet import one_after_the_other
from seed_exp.benchmarks.bench_step import synthetic_batch
from seed_exp.benchmarks.measure import BenchReport, Contender, interleave, machine
from seed_exp.config.schema import BenchConfig, FitConfig
from seed_exp.data.transfer import moved
from seed_exp.engine.distributed import local_device
from seed_exp.engine.fleet import Fleet
from seed_exp.engine.precision import autocast, resolve
from seed_exp.methods.linear_probe import LinearProbe
from seed_exp.models.students import build_student
from seed_exp.models.teachers import EMBEDDING_DIM
from seed_exp.views.recipe import TrainViews

LRS = (0.3, 1.0, 3.0, 10.0, 30.0)
NUM_CLASSES = 1000


def bench(config: BenchConfig) -> BenchReport:
    """Measures images per second at which classifiers of all LRS learn on a student's features.

    Raises:
        ValueError: there are several students.
    """
    if len(config.students) > 1:
        raise ValueError(
            f"bench=linear measures one student, got {', '.join(config.students)}; choose one"
        )
    ((name, student),) = config.students.items()
    device = local_device(config.device)
    views = TrainViews(config.views, seed=0)
    batch = synthetic_batch(views, config.batch_size, device)
    batch = batch._replace(labels=torch.arange(config.batch_size) % NUM_CLASSES)
    torch.manual_seed(0)
    encoder = build_student(student, EMBEDDING_DIM).encoder.to(device).eval()

    def training(lrs: Sequence[float]) -> Callable[[], None]:
        """Returns a function that trains classifiers with these learning rates for a step."""
        probe = LinearProbe({name: encoder}, lrs, NUM_CLASSES, seed=0)
        options = FitConfig(
            precision=config.precision, compile=config.compile, optimizer=config.optimizer
        )
        forever = dict.fromkeys(probe.trainable, 1 << 30)
        size = config.batch_size
        fleet = Fleet(
            probe,
            views,
            options,
            device,
            batch_size=size,
            steps_per_epoch=1,
            num_steps=forever,
            lrs=probe.lrs,
        )
        number = itertools.count()

        def step() -> None:
            fleet.step(moved(batch, device), next(number), measure=False)

        return step

    images = views.device(moved(batch, device))["global"][0]
    ways = [
        Contender(
            "one evaluation per rate",
            one_after_the_other([training([lr]) for lr in LRS]),
            config.batch_size,
        ),
        Contender("ours, all rates at once", training(LRS), config.batch_size),
        Contender("features", lambda: _features(encoder, images, config), config.batch_size),
    ]
    *rows, bound = interleave(ways, seconds=config.seconds, device=device)
    facts = {
        "student": name,
        "learning rates": ", ".join(f"{lr:g}" for lr in LRS),
        "batch": f"{config.batch_size} images of {images.shape[-1]} px",
        "precision": resolve(config.precision, device).value,
    }
    return BenchReport(
        "linear evaluation", "img/s", rows, rows[0].name, [bound], facts | machine(device)
    )


@torch.no_grad()
def _features(encoder: nn.Module, images: torch.Tensor, config: BenchConfig) -> None:
    with autocast(config.precision, images.device):
        encoder(images)
