"""Options that several commands have in common, by config group."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from seed_exp.config.schema.enums import (
    OnError,
    ScheduleName,
    TrackerMode,
)
from seed_exp.config.schema.queues import WithQueue
from seed_exp.config.schema.resolution import require_phases, size_at


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_global_only(views: ViewsConfig, command: str) -> None:
    others = [name for name, crop in views.crops.items() if name != "global" and crop.num > 0]
    hint = ", ".join(f"views.crops.{name}.num=0" for name in others)
    require(
        not others,
        f"{command} uses global views only; set {hint} or choose another recipe than {views.name}",
    )


def require_unmixed(views: ViewsConfig, command: str, reason: str) -> None:
    require(
        not views.mixup,
        f"{command} does not take views.mixup=true: {reason}; set views.mixup=false",
    )


def require_one_size(views: ViewsConfig, command: str) -> None:
    require(
        views.resolution is None,
        f"{command} takes views of one size, and views.resolution={views.resolution} has phases, "
        "for distill, pretrain, plan and preview; set views.resolution=null",
    )


@dataclass
class CropConfig:
    size: int = 224
    """Side of the square view in pixels."""
    num: int = 1
    """Views of this size per image."""
    scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Smallest and largest share of the image's area that a crop covers."""

    def __post_init__(self) -> None:
        require(self.size >= 2, f"crop size must be at least 2 pixels, got {self.size}")
        require(self.num >= 0, f"number of views must not be negative, got {self.num}")
        ordered = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1
        require(
            ordered,
            "crop scale must be [smallest, largest] with 0 < smallest <= largest <= 1, "
            f"got {self.scale}",
        )


@dataclass
class ViewsConfig:
    name: str = MISSING
    """Name of the recipe, for reports."""
    crops: dict[str, CropConfig] = field(default_factory=dict)
    """Resolutions by name: `global` (required) and, with multi-crop, `local`."""
    resolution: list[Any] | None = None
    """Sizes of global views over time, [[first epoch or step, size, ...], ...]; null = one size."""
    aspect_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Smallest and largest width/height of a crop."""
    jitter: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    """Largest change of brightness, contrast, saturation (1 +- x) and hue (+- x turns, <= 0.5)."""
    jitter_prob: float = 0.0
    """Probability of colour jitter, per view."""
    grayscale_prob: float = 0.0
    """Probability of grayscale, per view."""
    grayscale_first: bool = False
    """Whether grayscale comes before the jitter (MoCo-V1) instead of after it."""
    blur_prob: float = 0.0
    """Probability of Gaussian blur, per view."""
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    """Smallest and largest standard deviation of the blur in pixels of the view."""
    flip_prob: float = 0.0
    """Probability of a horizontal flip, per view."""
    operations: list[str] = field(default_factory=list)
    """Keys of views.operations.VIEW_OPERATIONS, applied in this order after the blur."""
    mixup: bool = False
    """distill: whether each view is mixed with that of another image, in a uniform proportion."""
    eval_size: int = 224
    """Side of the evaluation view (centre crop) in pixels."""
    eval_resize: int = 256
    """Shorter side to which evaluation images are resized before the centre crop, in pixels."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of the pixel values (0 to 1) per channel, subtracted."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of the pixel values (0 to 1) per channel, divided by."""

    def __post_init__(self) -> None:
        require(
            "global" in self.crops and self.crops["global"].num >= 1,
            f"views need at least one global view; views.crops has {sorted(self.crops)}",
        )
        if self.resolution is not None:
            require_phases(self.resolution)
        for option in ("jitter_prob", "grayscale_prob", "blur_prob", "flip_prob"):
            value = getattr(self, option)
            require(0 <= value <= 1, f"views.{option} must be a probability, got {value}")
        valid_jitter = (
            len(self.jitter) == 4
            and all(0 <= change <= 100 for change in self.jitter)
            and self.jitter[3] <= 0.5
        )
        require(
            valid_jitter,
            "views.jitter must be four numbers from 0 to 100, the last (hue) <= 0.5, "
            f"got {self.jitter}",
        )
        ordered_blur = (
            len(self.blur_sigma) == 2 and 0 < self.blur_sigma[0] <= self.blur_sigma[1] <= 100
        )
        require(
            ordered_blur,
            "views.blur_sigma must be [smallest, largest], above 0 and up to 100, "
            f"got {self.blur_sigma}",
        )
        ordered_ratio = (
            len(self.aspect_ratio) == 2 and 0 < self.aspect_ratio[0] <= self.aspect_ratio[1]
        )
        require(
            ordered_ratio,
            f"views.aspect_ratio must be [smallest, largest], above 0, got {self.aspect_ratio}",
        )
        three = len(self.mean) == len(self.std) == 3
        valid_norm = (
            three
            and all(map(math.isfinite, self.mean + self.std))
            and all(std > 0 for std in self.std)
        )
        require(
            valid_norm,
            "views.mean and views.std need 3 finite values each, std > 0, "
            f"got {self.mean} and {self.std}",
        )
        require(
            0 < self.eval_size <= self.eval_resize,
            "need 0 < views.eval_size <= views.eval_resize, "
            f"got {self.eval_size} and {self.eval_resize}",
        )

    def size_at(self, time: int) -> int:
        """Side of global views in epoch `time` (or step, where the run is stated in steps)."""
        phases = self.resolution
        return self.crops["global"].size if phases is None else size_at(phases, time)

    @property
    def global_sizes(self) -> list[int]:
        """Sides that global views have at some time, ascending."""
        if self.resolution is None:
            return [self.crops["global"].size]
        return sorted({size for phase in self.resolution for size in phase[1:]})

    @property
    def sizes(self) -> list[int]:
        """Sides that views of any resolution have at some time, ascending."""
        others = {crop.size for name, crop in self.crops.items() if name != "global" and crop.num}
        return sorted(others.union(self.global_sizes))

    def of_size(self, size: int) -> ViewsConfig:
        """The recipe without phases, with global views of `size` pixels."""
        if self.resolution is None and size == self.crops["global"].size:
            return self
        crop = replace(self.crops["global"], size=size)
        return replace(self, crops={**self.crops, "global": crop}, resolution=None)

    def largest(self) -> ViewsConfig:
        """The recipe without phases, with the largest global views that there are at some time."""
        return self.of_size(self.global_sizes[-1])


@dataclass
class DataConfig:
    source: str = MISSING
    """Key of data.sources.SOURCES."""
    root: str | None = None
    """Folder or file of the images."""
    val_root: str | None = None
    """Folder or file of the validation images; null = within root (val.tsv, val/, test split)."""
    val_fraction: float = 0.0
    """Share of root's images held out for validation, if there are no others; always the same."""
    fraction: float = 1.0
    """Share of each class's training images to use, at least one image; shares are nested."""
    fraction_seed: int = 0
    """fraction: seed of the choice."""
    subset: str | None = None
    """File of training images to use, one name a line (SimCLR's 1percent.txt); null = all."""
    name: str | None = None
    """source=torchvision: class in torchvision.datasets, e.g. CIFAR10; hf: hub's OWNER/NAME."""
    config: str | None = None
    """source=hf: configuration of a data set that has several."""
    train_split: str | None = None
    """source=hf, parquet: split with the training images; null = train, or the only one."""
    val_split: str | None = None
    """source=hf, parquet: split with the validation images; null = validation, val, dev or test."""
    image_column: str | None = None
    """source=hf, parquet: column of the images; null = the only one that can be."""
    label_column: str | None = None
    """source=hf, parquet: column of the labels; null = the only one that can be, or no labels."""
    download: bool = False
    """source=torchvision: whether absent files are downloaded."""
    num_workers: int | None = None
    """Decoding processes per rank; null = its share of the cores, 0 = the training process."""
    on_error: OnError = OnError.skip
    """Unreadable image: skip = replace and list it in bad_samples.jsonl; raise = error."""
    max_bad: float = 0.01
    """on_error=skip: largest share of unreadable images."""

    def __post_init__(self) -> None:
        require(
            0 <= self.val_fraction < 1,
            f"data.val_fraction must be in [0, 1), got {self.val_fraction}",
        )
        require(
            0 < self.fraction <= 1,
            f"data.fraction must be above 0 and up to 1, got {self.fraction}",
        )
        require(
            0 <= self.fraction_seed < 2**63,
            f"data.fraction_seed must be from 0 to 2^63 - 1, got {self.fraction_seed}",
        )
        require(
            self.subset is None or self.fraction == 1,
            f"data.subset={self.subset} and data.fraction={self.fraction} both choose images; "
            "give one of them",
        )
        require(
            self.num_workers is None or self.num_workers >= 0,
            f"data.num_workers must be null or >= 0, got {self.num_workers}",
        )
        require(0 <= self.max_bad <= 1, f"data.max_bad must be in [0, 1], got {self.max_bad}")


@dataclass
class OptimizerConfig:
    name: str = MISSING
    """Key of engine.optimizers.OPTIMIZERS."""
    lr: float = MISSING
    """Peak learning rate at a global batch of 256; multiplied by batch_size / 256."""
    momentum: float = 0.9
    """sgd, lars: momentum of the gradient."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """adamw: shares that each step keeps of the gradient's mean and of its square's mean."""
    weight_decay: float = 1e-4
    """sgd, lars: L2 penalty; adamw: decay apart from the gradient; lars, adamw: not of vectors."""
    trust_coefficient: float = 0.001
    """LARS: ratio of the update's norm to the weight's norm at lr 1."""
    clip_grad_norm: float | None = None
    """Largest L2 norm of each student's gradient; null = no clipping."""
    schedule: ScheduleName = ScheduleName.cosine
    """Course of the learning rate after the warm-up."""
    warmup_epochs: float = 5.0
    """Epochs in which the learning rate rises linearly from 0 to its peak."""
    milestones: list[float] = field(default_factory=list)
    """schedule=step: epochs after which the learning rate is multiplied by gamma."""
    gamma: float = 0.1
    """schedule=step: factor of the learning rate at each milestone."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optimizer.lr must be positive, got {self.lr}")
        require(
            self.warmup_epochs >= 0,
            f"optimizer.warmup_epochs must not be negative, got {self.warmup_epochs}",
        )
        require(
            0 <= self.momentum < 1, f"optimizer.momentum must be in [0, 1), got {self.momentum}"
        )
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas must be two numbers in [0, 1), got {self.betas}",
        )
        require(
            self.weight_decay >= 0,
            f"optimizer.weight_decay must not be negative, got {self.weight_decay}",
        )
        require(
            self.trust_coefficient > 0,
            f"optimizer.trust_coefficient must be positive, got {self.trust_coefficient}",
        )
        require(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            f"optimizer.clip_grad_norm must be null or positive, got {self.clip_grad_norm}",
        )
        require(self.gamma > 0, f"optimizer.gamma must be positive, got {self.gamma}")


def require_group_size(owner: str, size: int | None) -> None:
    """Checks the size of batch norm's groups.

    Raises:
        ValueError: a group of one image has no statistics.
    """
    require(
        size is None or size >= 2,
        f"{owner}.bn_group_size must be null or at least 2 images, got {size}",
    )


@dataclass
class MocoConfig(WithQueue):
    temperature: float = 0.2
    """Temperature of InfoNCE."""
    momentum: float = 0.999
    """Share of the momentum encoder that each step keeps."""
    queue_size: Any = "auto"
    """Keys kept as negatives; auto = 65536, or a power of two up to half of fewer images."""
    bn_group_size: int | None = 32
    """Images that batch norm normalises together, keys with others than queries; null = all."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"moco.temperature must be positive, got {self.temperature}")
        require(0 <= self.momentum <= 1, f"moco.momentum must be in [0, 1], got {self.momentum}")
        self.require_queue_size("moco")
        require_group_size("moco", self.bn_group_size)


@dataclass
class TrackerConfig:
    name: str = MISSING
    """Key of engine.tracking.TRACKERS; metrics.jsonl is always written."""
    project: str = "seed_exp"
    """W&B project, MLflow experiment."""
    entity: str | None = None
    """W&B team or user; null = the account's default."""
    group: str | None = None
    """W&B group, MLflow tag; an experiment sets it; null = beginning of the run folder's name."""
    tags: list[str] = field(default_factory=list)
    """Tags of W&B and MLflow."""
    mode: TrackerMode = TrackerMode.auto
    """Mode of W&B: auto = online if logged in and the server answers, otherwise offline."""
    artifacts: bool = False
    """Whether W&B or MLflow also gets the students' files with every checkpoint."""
