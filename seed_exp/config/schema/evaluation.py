"""Options of the commands that evaluate a run's students, and the table of these commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from omegaconf import MISSING

from seed_exp.config.schema.enums import GallerySplit, Precision
from seed_exp.config.schema.parts import (
    DataConfig,
    require,
    require_global_only,
    require_one_size,
    require_unmixed,
)
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
    recalibrate_bn: bool = False
    """Whether batch norm's statistics are first measured on training images, as PreciseBN does."""

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
        require_one_size(self.views, "linear")
        require_unmixed(self.views, "linear", "the label would be that of one of the two images")


@dataclass
class FinetuneConfig(FitConfig, OfRunConfig):
    lrs: list[float] = field(default_factory=list)
    """Encoder learning rates (at a batch of 256, times optimizer.lr), each of one copy."""
    classifier_lr_factor: float = 20.0
    """Learning rate of the new classifier as a multiple of its encoder's."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        OfRunConfig.__post_init__(self)
        require(
            len(self.lrs) > 0 and min(self.lrs) > 0,
            f"lrs must be one or more positive learning rates, got {self.lrs}",
        )
        factor = self.classifier_lr_factor
        require(factor > 0, f"classifier_lr_factor must be positive, got {factor}")
        num = self.views.crops["global"].num
        require(num == 1, f"fine-tuning uses one view of an image; views.crops.global.num is {num}")
        require_global_only(self.views, "finetune")
        require_one_size(self.views, "finetune")
        require_unmixed(self.views, "finetune", "the label would be that of one of the two images")


SOURCES_WITH_OBJECTS = ("voc", "coco")
"""Keys of data.sources.SOURCES whose images come with boxes around objects."""


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
        data = self.data
        require(
            data.source in SOURCES_WITH_OBJECTS and data.fraction == 1 and data.subset is None,
            "detect needs images with boxes around objects, all of them: data=voc or data=coco, "
            f"without data.fraction and data.subset; got data={data.source} "
            f"data.fraction={data.fraction:g} data.subset={data.subset}",
        )
        require_unmixed(self.views, "detect", "its images stay whole")
        require_one_size(self.views, "detect")
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


SOURCES_WITH_MASKS = ("ade20k", "mask_folder", "voc_masks")
"""Keys of data.sources.SOURCES whose images come with a class for each pixel."""
IGNORED = 255
"""Value in a mask of pixels without a class, which are neither learnt nor counted."""


@dataclass
class SegmentConfig(FitConfig, OfRunConfig):
    crop_size: int = 512
    """Side of the square crops in pixels: of training, and of the windows of evaluation."""
    scales: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Training: shorter side to which images are resized, in crop sides, smallest and largest."""
    num_classes: int | None = None
    """data=mask_folder: number of classes; null = one more than the largest in training masks."""
    recalibrate_bn: bool = False
    """Whether batch norm's statistics are first measured on training images, as PreciseBN does."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        OfRunConfig.__post_init__(self)
        require(
            self.data.source in SOURCES_WITH_MASKS,
            "segment needs images with masks: data=voc_masks, data=ade20k or data=mask_folder; "
            f"got data={self.data.source}",
        )
        require_one_size(self.views, "segment")
        require_global_only(self.views, "segment")
        crops = self.views.crops["global"].num
        require(
            crops == 1, f"segment takes one crop of an image, views.crops.global.num is {crops}"
        )
        require_unmixed(self.views, "segment", "a pixel's class would be that of one of two images")
        require(
            not self.views.operations,
            f"segment takes no views.operations, got {self.views.operations}: "
            "they would change images and not their masks",
        )
        require(self.crop_size >= 16, f"crop_size must be at least 16 pixels, got {self.crop_size}")
        require(
            len(self.scales) == 2 and 0.1 <= self.scales[0] <= self.scales[1] <= 10,
            f"scales must be [smallest, largest], from 0.1 to 10, got {self.scales}",
        )
        num = self.num_classes
        require(
            num is None or (self.data.source == "mask_folder" and 2 <= num <= IGNORED),
            f"num_classes is for data=mask_folder, from 2 to {IGNORED}; "
            f"got num_classes={num} data={self.data.source}",
        )


@dataclass
class FeaturesConfig(OfRunConfig):
    """Options of the evaluations that compare features and train nothing."""

    recalibrate_bn: bool = False
    """Whether batch norm's statistics are first measured on training images, as PreciseBN does."""
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
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")


@dataclass
class KnnConfig(FeaturesConfig):
    ks: list[int] = field(default_factory=lambda: [10, 20, 200])
    """Numbers of neighbours, each with a majority and a weighted vote."""
    temperature: float = 0.07
    """Temperature of the weighted vote."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.ks) > 0 and min(self.ks) > 0,
            f"ks must be one or more numbers of neighbours above 0, got {self.ks}",
        )
        require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")


@dataclass
class RetrievalConfig(FeaturesConfig):
    gallery: GallerySplit = GallerySplit.train
    """Images to search for those of a validation image's class; val = all other validation ones."""
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """Numbers of images that recall looks at, nearest first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.ks) > 0 and min(self.ks) > 0,
            f"ks must be one or more numbers of images above 0, got {self.ks}",
        )
        require(
            len(set(self.ks)) == len(self.ks),
            f"ks must be different numbers of images, got {self.ks}",
        )


class FewLabels(NamedTuple):
    """A share of the training labels that makes an evaluation a benchmark of its own."""

    fraction: float
    """data.fraction."""
    subset: str
    """Name of the file data.subset without its suffix: one of SimCLR's lists of ImageNet images."""


class Measure(NamedTuple):
    """A number of an evaluation that has a column in reports; percent."""

    column: str
    """Heading of the column."""
    evaluation: str
    """The evaluation's name in reports: the command, unless few labels make it another one."""
    key: str
    """In a file of results."""
    protocol: str
    """In published.csv."""
    meaning: str
    """The same in words."""
    asked: bool = True
    """Whether a run lacks something without it."""
    labels: FewLabels | None = None
    """The labels with which the evaluation has this name; None = any."""


@dataclass(frozen=True)
class EvaluationKind:
    """A command that measures a run's students."""

    schema: type[Any]
    """Its options."""
    title: str
    """Its name in words."""
    headline: str
    """The first number to look at; key in a file of results."""
    trains: bool = True
    """Whether it trains networks; its run folders are then in the evaluated run's `<command>/`."""
    measures: tuple[Measure, ...] = ()
    """Its columns in reports; other results are listed below the table."""
    inherits: tuple[str, ...] = (
        "data",
        "tracker",
        "device",
        "precision",
        "deterministic",
        "seed",
    )
    """Options that it takes from a training that it follows, where it has them."""
    takes_views: bool = True
    """Whether the sizes and the normalisation of the run's views are defaults of its `views`."""
    sources: tuple[str, ...] | None = None
    """Keys of data.sources.SOURCES that it takes; None = all. It inherits no other data."""


EVALUATIONS: dict[str, EvaluationKind] = {
    "knn": EvaluationKind(
        KnnConfig,
        "k-NN top-1",
        headline="knn10_majority",
        trains=False,
        measures=(
            Measure("K", "knn", "knn10_majority", "knn", "k-NN top-1, k = 10, majority vote"),
        ),
    ),
    "retrieval": EvaluationKind(
        RetrievalConfig,
        "retrieval",
        headline="map",
        trains=False,
        measures=(
            Measure("mAP", "retrieval", "map", "retrieval_map", "retrieval, mean AP", asked=False),
            Measure(
                "R@1", "retrieval", "recall1", "retrieval_r1", "retrieval, recall@1", asked=False
            ),
        ),
    ),
    "linear": EvaluationKind(
        LinearConfig,
        "linear evaluation",
        headline="top1",
        measures=(
            Measure("T-1", "linear", "top1", "linear_top1", "linear evaluation, top-1"),
            Measure("T-5", "linear", "top5", "linear_top5", "linear evaluation, top-5"),
        ),
    ),
    "finetune": EvaluationKind(
        FinetuneConfig,
        "fine-tuning",
        headline="top1",
        measures=(
            Measure(
                "1 %",
                "semi_1pct",
                "top1",
                "semi_1pct",
                "fine-tuned with 1 % of the labels, top-1",
                asked=False,
                labels=FewLabels(0.01, "1percent"),
            ),
            Measure(
                "10 %",
                "semi_10pct",
                "top1",
                "semi_10pct",
                "fine-tuned with 10 % of the labels, top-1",
                asked=False,
                labels=FewLabels(0.1, "10percent"),
            ),
        ),
    ),
    "detect": EvaluationKind(
        DetectConfig,
        "detection",
        headline="box_ap",
        inherits=("data", "tracker", "device", "deterministic", "seed"),
        takes_views=False,
        sources=SOURCES_WITH_OBJECTS,
    ),
    "segment": EvaluationKind(
        SegmentConfig,
        "segmentation",
        headline="miou",
        measures=(
            Measure("mIoU", "segment", "miou", "segment_miou", "segmentation, mIoU", asked=False),
        ),
        takes_views=False,
        sources=SOURCES_WITH_MASKS,
    ),
}
"""Every command that measures a run's students; `seed_exp/protocols/<command>.py` does the work."""
