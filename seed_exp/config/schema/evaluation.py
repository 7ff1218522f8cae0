"""Options of the commands that evaluate a run's students."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from seed_exp.config.schema.enums import Precision
from seed_exp.config.schema.parts import DataConfig, require, require_global_only
from seed_exp.config.schema.training import FitConfig


@dataclass
class OfRunConfig:
    """Options that the commands on trained students share."""

    run: str = MISSING
    """Run folder of `distill` or `pretrain`, or a student file of one."""
    networks: list[str] | None = None
    """Names of the students of the run; null = all."""

    def __post_init__(self) -> None:
        require(self.networks != [], "networks=[] names no student; name some, or null for all")


@dataclass
class LinearConfig(FitConfig, OfRunConfig):
    lrs: list[float] = field(default_factory=list)
    """Learning rates (at a batch of 256, times optimizer.lr), each of one classifier."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        OfRunConfig.__post_init__(self)
        require(
            len(self.lrs) > 0 and min(self.lrs) > 0,
            f"lrs must be one or more positive learning rates, got {self.lrs}",
        )
        num = self.views.crops["global"].num
        require(
            num == 1,
            f"linear evaluation uses one view of an image; views.crops.global.num is {num}",
        )
        require_global_only(self.views, "linear")


@dataclass
class FinetuneConfig(FitConfig, OfRunConfig):
    lrs: list[float] = field(default_factory=list)
    """Encoder learning rates (at a batch of 256, times optimizer.lr), each of one copy."""
    classifier_lr_factor: float = 20.0
    """Learning rate of the classifier / encoder; unless 1, needs optimizer.weight_decay=0."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        OfRunConfig.__post_init__(self)
        require(
            len(self.lrs) > 0 and min(self.lrs) > 0,
            f"lrs must be one or more positive learning rates, got {self.lrs}",
        )
        factor, decay = self.classifier_lr_factor, self.optimizer.weight_decay
        require(factor > 0, f"classifier_lr_factor must be positive, got {factor}")
        require(
            factor == 1 or decay == 0,
            f"optimizer.weight_decay={decay} would not decay a classifier that learns {factor:g} "
            "times as fast by as much; use optimizer.weight_decay=0 or classifier_lr_factor=1",
        )
        require(
            self.optimizer.name == "sgd",
            "finetune trains classifiers at rates of their own, which needs optimizer.name=sgd, "
            f"got {self.optimizer.name}",
        )
        num = self.views.crops["global"].num
        require(num == 1, f"fine-tuning uses one view of an image; views.crops.global.num is {num}")
        require_global_only(self.views, "finetune")


@dataclass
class DetectConfig(FitConfig, OfRunConfig):
    detector: str = "fpn"
    """Key of models.detectors.DETECTORS: fpn (pyramid) or c4 (head = a ResNet's last stage)."""
    masks: bool = False
    """Whether to train Mask R-CNN (needs data with masks: coco) instead of Faster R-CNN."""
    short_sides: list[int] = field(default_factory=list)
    """Shorter sides of images in pixels: one at random in training, the largest in evaluation."""
    long_side: int = 1333
    """Longest side of an image in pixels."""
    freeze_bn: bool = False
    """Whether the encoder's batch norm is frozen: statistics, scales and shifts."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        OfRunConfig.__post_init__(self)
        sides = self.short_sides
        require(
            len(sides) > 0 and min(sides) >= 32,
            f"short_sides must be one or more sizes of at least 32 pixels, got {sides}",
        )
        require(
            self.long_side >= max(sides),
            f"long_side={self.long_side} is below the largest of short_sides={sides}",
        )
        require(
            self.compile is False,
            f"detect does not compile: its images have different sizes; got compile={self.compile}",
        )
        require(
            self.precision is Precision.float32,
            f"detect needs precision=float32, got {self.precision.value}: "
            "bfloat16 would round boxes to several pixels",
        )


@dataclass
class KnnConfig(OfRunConfig):
    ks: list[int] = field(default_factory=lambda: [10, 20, 200])
    """Numbers of neighbours, each with a majority and a weighted vote."""
    temperature: float = 0.07
    """Temperature of the weighted vote."""
    batch_size: int = 256
    """Images per forward pass."""
    device: str = "auto"
    """Device: auto = a GPU if there is one; or cpu, cuda."""
    precision: Precision = Precision.auto
    """Number format of the forward pass."""
    data: DataConfig = MISSING
    """Source of the labelled images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.ks) > 0 and min(self.ks) > 0,
            f"ks must be one or more numbers of neighbours above 0, got {self.ks}",
        )
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
