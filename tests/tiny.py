"""The smallest things that `fit` can train: random images, networks of a few hundred weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seed_exp.config.schema import (
    CropConfig,
    FitConfig,
    MocoConfig,
    OptimizerConfig,
    ScheduleName,
    SeedConfig,
    TrackerConfig,
    ViewsConfig,
)
from seed_exp.engine.averages import Averages
from seed_exp.engine.fit import fit
from seed_exp.engine.fleet import derive_seed
from seed_exp.engine.method import Method
from seed_exp.engine.run import Run
from seed_exp.methods.linear_probe import LinearProbe
from seed_exp.methods.moco import Moco
from seed_exp.methods.seed import Seed
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.students import Student
from seed_exp.views.recipe import HostBatch, TrainViews

DIM = 4


class Images:
    """Random images with labels; reading one raises once `fail_after` have been read."""

    def __init__(self, num: int = 40, fail_after: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.pixels = torch.randint(
            0, 256, (num, 3, 10, 10), generator=generator, dtype=torch.uint8
        )
        self.labels = np.arange(num, dtype=np.int64) % 3
        self.left = fail_after

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Tensor:
        if self.left is not None:
            if self.left == 0:
                raise ValueError("unplugged")
            self.left -= 1
        return self.pixels[index]

    def key(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return f"random[{len(self)}]"


class Encoder(nn.Module):
    """Convolution, then batch norm or none, ReLU, average, dropout."""

    def __init__(self, width: int, *, bn: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2),
            nn.BatchNorm2d(width) if bn else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.num_features = width

    def forward_features(self, images: Tensor) -> Tensor:
        maps: Tensor = self.layers(images)
        return maps

    def forward_head(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def students(
    names: Iterable[str] = ("a",), *, bn: bool = True, dropout: float = 0.0
) -> dict[str, Student]:
    """Students by name; weights depend on the name only."""
    out = {}
    for name in names:
        torch.manual_seed(derive_seed("weights", name))
        out[name] = Student(Encoder(6, bn=bn, dropout=dropout), None, DIM)
    return out


def host_batch(num: int, labels: Tensor | None = None, epoch: int = 0) -> HostBatch:
    """A batch of `num` images for methods, which get the views beside it."""
    return HostBatch(
        {}, {}, torch.full((num,), -1) if labels is None else labels, torch.arange(num), epoch
    )


def teacher() -> Teacher:
    """A teacher with batch norm whose running statistics are not those of any batch."""
    torch.manual_seed(11)
    encoder = Encoder(8, bn=True)
    encoder.layers[1].running_mean.uniform_(-0.1, 0.1)
    encoder.layers[1].running_var.uniform_(0.5, 2)
    return Teacher(encoder, nn.Linear(8, DIM), DIM)


def seed(
    names: Iterable[str] = ("a",), *, bn: bool = True, dropout: float = 0.0, queue_size: int = 21
) -> Seed:
    config = SeedConfig(tau_student=0.2, tau_teacher=0.05, queue_size=queue_size)
    return Seed(
        students(names, bn=bn, dropout=dropout), teacher(), config, ["global", "local"], seed=3
    )


def moco(names: Iterable[str] = ("a",), *, bn: bool = True, dropout: float = 0.0) -> Moco:
    return Moco(students(names, bn=bn, dropout=dropout), MocoConfig(0.2, 0.9, 21), seed=3)


def probe(lrs: tuple[float, ...] = (1.0, 3.0)) -> LinearProbe:
    torch.manual_seed(5)
    return LinearProbe({"a": Encoder(6, bn=True)}, lrs, num_classes=3, seed=2)


def views_config(**changes: Any) -> ViewsConfig:
    crops = {"global": CropConfig(8, 2, [0.5, 1.0]), "local": CropConfig(6, 3, [0.2, 0.5])}
    options: dict[str, Any] = {
        "name": "tiny",
        "crops": crops,
        "jitter": [0.4, 0.4, 0.2, 0.1],
        "jitter_prob": 0.8,
    }
    return ViewsConfig(**{**options, "flip_prob": 0.5, "eval_size": 8, "eval_resize": 8, **changes})


def fit_config(**changes: Any) -> FitConfig:
    """Options of 12 steps, which are two epochs and a bit of `Images()`.

    Intervals of logs, checkpoints and epochs do not fit each other.
    """
    options: dict[str, Any] = {
        "steps": 12,
        "batch_size": 8,
        "log_every": 3,
        "checkpoint_every": 2,
        "eval_every": 1,
        "seed": 1,
    }
    return FitConfig(**{**options, **changes})


def optimizer_config(**changes: Any) -> OptimizerConfig:
    options: dict[str, Any] = {
        "name": "sgd",
        "lr": 3.0,
        "warmup_epochs": 0.4,
        "schedule": ScheduleName.cosine,
    }
    return OptimizerConfig(**{**options, **changes})


def train(
    method: Method,
    folder: Path,
    config: FitConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    *,
    source: Images | None = None,
    num_workers: int = 0,
    evaluate: Callable[[Collection[str]], Mapping[str, float]] | None = None,
    on_checkpoint: Callable[[Mapping[str, int], Any, int], None] = lambda *_: None,
    epochs: Mapping[str, int] | None = None,
    lrs: Mapping[str, float] | None = None,
    ema_decay: float | None = None,
    mixup: bool = False,
    resolution: list[list[int]] | None = None,
) -> Path:
    """Calls `fit`, which goes on where the run in `folder` is; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(
        config or fit_config(),
        optimizer=optimizer or optimizer_config(),
        tracker=TrackerConfig("files"),
    )
    run = Run("tiny", "tiny", config, folder, {}, torch.device("cpu"), num_workers, None)

    def norms(
        names: Collection[str],
    ) -> dict[str, float]:  # depends on the weights, and evaluates as k-NN does
        networks = {name: method.trainable[name].eval() for name in names}
        return {
            f"{name}/norm": sum(p.detach().double().norm().item() for p in network.parameters())
            for name, network in networks.items()
        }

    averages = None
    if ema_decay is not None:
        averages = Averages(method.trainable, ema_decay, torch.device("cpu"))
    with run.tracked(list(method.trainable)):
        fit(
            method,
            source or Images(),
            TrainViews(views_config(mixup=mixup, resolution=resolution), seed=1),
            run,
            evaluate=evaluate or norms,
            on_checkpoint=on_checkpoint,
            epochs=epochs,
            lrs=lrs,
            averages=averages,
        )
    return folder


def last_checkpoint(folder: Path) -> dict[str, Any]:
    """All that the newest checkpoint holds, less what depends on the clock.

    That is the place in speed.jsonl, hence the hash.
    """
    state: dict[str, Any] = torch.load(
        max((folder / "checkpoints").glob("step_*.pt")), weights_only=True
    )
    del state["tracker"]["speed.jsonl"], state["content_hash"]
    return state


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as {"networks/a/head.0.weight": ...}."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {
            key: value
            for name, inner in items
            for key, value in flat(inner, f"{prefix}/{name}").items()
        }
    return {prefix: state}


def assert_same(first: Any, second: Any) -> None:
    """Checks that both nested states are equal, bit for bit."""
    one, two = flat(first), flat(second)
    assert one.keys() == two.keys()
    different = [key for key in one if not _equal(one[key], two[key])]
    assert different == []


def _equal(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


def weights(method: Method) -> dict[str, dict[str, Tensor]]:
    """A copy of what the networks hold."""
    return {name: copy.deepcopy(network.state_dict()) for name, network in method.trainable.items()}


def replaced(config: Any, **changes: Any) -> Any:
    return dataclasses.replace(config, **changes)


def embeddings(num: int, dim: int, seed: int, near: Tensor | None = None) -> Tensor:
    """Unit embeddings [num, dim]; with `near`, close to those."""
    noise = torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(noise if near is None else near + 0.2 * noise, dim=1)
