"""Every option of every command: name, type, default, meaning, unit. The values of named options are in conf/.

Checks in `__post_init__` run when `typed()` turns the composed config into these classes, before anything starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Precision(Enum):
    """Number format of the forward pass; weights and losses are float32 in either case."""

    auto = "auto"  # bfloat16 on a GPU since Ampere, otherwise float32
    float32 = "float32"  # without TF32, on a GPU too
    bfloat16 = "bfloat16"


class ScheduleName(Enum):
    """How the learning rate goes from its peak to the end of training."""

    cosine = "cosine"
    step = "step"
    constant = "constant"


class Resume(Enum):
    """What a run does when its folder holds a checkpoint: go on, or refuse; `must` refuses when there is none."""

    auto = "auto"
    never = "never"
    must = "must"


OnError = Enum("OnError", {"skip": "skip", "raise": "raise"})  # not a class: `raise` is no name in Python
"""What becomes of an image that cannot be read: `skip` replaces it by the next good one and lists it."""


class SplitName(Enum):
    """A part of the images."""

    train = "train"
    val = "val"


class DataFormat(Enum):
    """What images can be converted to."""

    tsv = "tsv"
    image_folder = "image_folder"
    shards = "shards"


class Reduce(Enum):
    """How a teacher's embeddings become narrower: both are projections onto principal components."""

    pca = "pca"  # keeps the proportions of the components
    whiten = "whiten"  # gives all of them the same variance


class FeatureType(Enum):
    """Number format in which features are kept."""

    float32 = "float32"
    float16 = "float16"


class TrackerMode(Enum):
    """Where W&B writes: `auto` is online when logged in and the server answers, otherwise offline."""

    auto = "auto"
    offline = "offline"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_global_only(views: ViewsConfig, command: str) -> None:
    others = [name for name, crop in views.crops.items() if name != "global" and crop.num > 0]
    hint = ", ".join(f"views.crops.{name}.num=0" for name in others)
    _require(not others, f"{command} uses global views only; set {hint} or choose another recipe than {views.name}")


@dataclass
class StudentConfig:
    network: str = MISSING
    """Key of models.students.STUDENTS."""
    name: str | None = None
    """Model name in timm; only for network=timm."""
    hidden_dim: int | None = None
    """Hidden width of the projection head; null = feature width of the encoder, 2048 = the strong variant."""
    deep_head: bool | None = None
    """Whether it has SimReg's four layers with batch norm instead of two; null = if the objective asks for it."""
    init: str | None = None
    """Weights to start from (encoder; head if equally wide): run folder, student file, SEED's file, timm's state dict."""
    epochs: int | None = None
    """Passes over the training images, where this student is to be trained for fewer than the run has; null = all."""

    def __post_init__(self) -> None:
        _require(self.hidden_dim is None or self.hidden_dim >= 1, f"hidden_dim must be null or at least 1, got {self.hidden_dim}")
        _require(self.epochs is None or self.epochs >= 1, f"students.<name>.epochs must be null or at least 1, got {self.epochs}")


@dataclass
class TeacherConfig:
    network: str = MISSING
    """Key of models.teachers.TEACHERS; `run` is a network of our own `pretrain` or `distill`, `timm` any of timm."""
    name: str | None = None
    """network=timm: its name there, e.g. vit_base_patch14_reg4_dinov2.lvd142m, or on the Hugging Face hub, hf-hub:ORG/MODEL."""
    checkpoint: str | None = None
    """Checkpoint file (for network=run: run folder or student file); null downloads the official file."""
    student: str | None = None
    """network=run: which network of the run, when it trained several."""
    reduce: Reduce | None = None
    """Narrower embeddings: a projection fitted before training, then fixed (kept in the run folder); null = as they are."""
    embedding_dim: int | None = None
    """reduce: width of the reduced embedding; null = 128."""
    num_reduce_images: int = 10000
    """reduce: training images, evenly spread, on whose evaluation views the projection is fitted, at most."""

    def __post_init__(self) -> None:
        _require(
            self.name is None or self.network == "timm",
            f"teacher.name={self.name} is only for teacher=timm; this teacher is {self.network}",
        )
        dim, num = self.embedding_dim, self.num_reduce_images
        _require(
            dim is None or self.reduce is not None,
            f"teacher.embedding_dim={dim} needs teacher.reduce=pca or whiten: without it embeddings are as wide as the teacher's",
        )
        _require(dim is None or dim >= 1, f"teacher.embedding_dim must be null or at least 1, got {dim}")
        _require(num >= 2, f"teacher.num_reduce_images must be at least 2, got {num}")


@dataclass
class TeacherSSLConfig:
    name: str = MISSING
    """Key of models.teacher_ssl.TEACHER_SSL: how the teacher's checkpoint names its tensors."""


@dataclass
class CropConfig:
    size: int = 224
    """Side of the square view in pixels."""
    num: int = 1
    """Views of this size per image."""
    scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Smallest and largest share of the image's area that a crop covers."""

    def __post_init__(self) -> None:
        _require(self.size >= 2, f"crop size must be at least 2 pixels, got {self.size}")
        _require(self.num >= 0, f"number of views must not be negative, got {self.num}")
        ordered = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1
        _require(ordered, f"crop scale must be [smallest, largest] with 0 < smallest <= largest <= 1, got {self.scale}")


@dataclass
class ViewsConfig:
    name: str = MISSING
    """Name of the recipe, for reports."""
    crops: dict[str, CropConfig] = field(default_factory=dict)
    """Resolutions by name: `global` (required) and, with multi-crop, `local`."""
    aspect_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Smallest and largest width/height of a crop."""
    jitter: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0])
    """Largest change of brightness, contrast, saturation (factor 1 +- x) and hue (shift +- x turns, at most 0.5)."""
    jitter_prob: float = 0.0
    """Probability of colour jitter, per view."""
    grayscale_prob: float = 0.0
    """Probability of grayscale, per view."""
    grayscale_first: bool = False
    """Grayscale before the jitter (MoCo-V1) instead of after it."""
    blur_prob: float = 0.0
    """Probability of Gaussian blur, per view."""
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    """Smallest and largest standard deviation of the blur in pixels of the view."""
    flip_prob: float = 0.0
    """Probability of a horizontal flip, per view."""
    eval_size: int = 224
    """Side of the evaluation view (centre crop) in pixels."""
    eval_resize: int = 256
    """Shorter side to which evaluation images are resized before the centre crop, in pixels."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of the pixel values (0 to 1) per channel, subtracted."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of the pixel values (0 to 1) per channel, divided by."""

    def __post_init__(self) -> None:
        _require(
            "global" in self.crops and self.crops["global"].num >= 1,
            f"views need at least one global view; views.crops has {sorted(self.crops)}",
        )
        for option in ("jitter_prob", "grayscale_prob", "blur_prob", "flip_prob"):
            value = getattr(self, option)
            _require(0 <= value <= 1, f"views.{option} must be a probability, got {value}")
        valid_jitter = len(self.jitter) == 4 and all(0 <= change <= 100 for change in self.jitter) and self.jitter[3] <= 0.5
        _require(valid_jitter, f"views.jitter must be four numbers from 0 to 100, the last (hue) <= 0.5, got {self.jitter}")
        ordered_blur = len(self.blur_sigma) == 2 and 0 < self.blur_sigma[0] <= self.blur_sigma[1] <= 100
        _require(ordered_blur, f"views.blur_sigma must be [smallest, largest], above 0 and up to 100, got {self.blur_sigma}")
        ordered_ratio = len(self.aspect_ratio) == 2 and 0 < self.aspect_ratio[0] <= self.aspect_ratio[1]
        _require(ordered_ratio, f"views.aspect_ratio must be [smallest, largest], above 0, got {self.aspect_ratio}")
        three = len(self.mean) == len(self.std) == 3
        valid_norm = three and all(map(math.isfinite, self.mean + self.std)) and all(std > 0 for std in self.std)
        _require(valid_norm, f"views.mean and views.std need 3 finite values each, std > 0, got {self.mean} and {self.std}")
        _require(
            0 < self.eval_size <= self.eval_resize,
            f"need 0 < views.eval_size <= views.eval_resize, got {self.eval_size} and {self.eval_resize}",
        )


@dataclass
class DataConfig:
    source: str = MISSING
    """Key of data.sources.SOURCES."""
    root: str | None = None
    """Folder or file of the images."""
    val_root: str | None = None
    """Folder or file of the validation images; null = what `root` holds (val.tsv, val/, the test split)."""
    val_fraction: float = 0.0
    """Share of `root`'s images held out for validation where no other validation images exist; the same in every run."""
    fraction: float = 1.0
    """Share of each class's training images that is used, at least one of each; a smaller share is part of a larger one."""
    fraction_seed: int = 0
    """fraction: seeds the choice."""
    subset: str | None = None
    """File with the names of the training images that are used, one a line, such as SimCLR's 1percent.txt; null = all."""
    name: str | None = None
    """source=torchvision: class in torchvision.datasets, e.g. CIFAR10."""
    download: bool = False
    """source=torchvision: download the files when they are absent."""
    num_workers: int | None = None
    """Processes per rank that decode and crop; null = this rank's share of the cores, 0 = in the training process."""
    on_error: OnError = OnError.skip
    """What an image that cannot be read does: skip = the next good one replaces it, bad_samples.jsonl lists it; raise = error."""
    max_bad: float = 0.01
    """on_error=skip: largest share of the images that may be bad."""

    def __post_init__(self) -> None:
        _require(0 <= self.val_fraction < 1, f"data.val_fraction must be in [0, 1), got {self.val_fraction}")
        _require(0 < self.fraction <= 1, f"data.fraction must be above 0 and up to 1, got {self.fraction}")
        _require(0 <= self.fraction_seed < 2**63, f"data.fraction_seed must be from 0 to 2^63 - 1, got {self.fraction_seed}")
        _require(
            self.subset is None or self.fraction == 1,
            f"data.subset={self.subset} and data.fraction={self.fraction} both choose images; give one of them",
        )
        _require(
            self.num_workers is None or self.num_workers >= 0,
            f"data.num_workers must be null or >= 0, got {self.num_workers}",
        )
        _require(0 <= self.max_bad <= 1, f"data.max_bad must be in [0, 1], got {self.max_bad}")


@dataclass
class OptimizerConfig:
    name: str = MISSING
    """Key of engine.optimizers.OPTIMIZERS."""
    lr: float = MISSING
    """Peak learning rate at a global batch of 256; multiplied by batch_size / 256."""
    momentum: float = 0.9
    """Momentum of the gradient."""
    weight_decay: float = 1e-4
    """L2 penalty, on every parameter for sgd, on matrices and kernels only for lars."""
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
    """schedule=step: the factor."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optimizer.lr must be positive, got {self.lr}")
        _require(self.warmup_epochs >= 0, f"optimizer.warmup_epochs must not be negative, got {self.warmup_epochs}")
        _require(0 <= self.momentum < 1, f"optimizer.momentum must be in [0, 1), got {self.momentum}")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}")
        _require(self.trust_coefficient > 0, f"optimizer.trust_coefficient must be positive, got {self.trust_coefficient}")
        _require(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            f"optimizer.clip_grad_norm must be null or positive, got {self.clip_grad_norm}",
        )
        _require(self.gamma > 0, f"optimizer.gamma must be positive, got {self.gamma}")


@dataclass
class ObjectiveConfig:
    name: str = MISSING
    """Key of methods.seed.OBJECTIVES."""
    tau_student: float = 0.2
    """Temperature of the student's similarity distribution."""
    tau_teacher: float = 0.01
    """Temperature of the teacher's similarity distribution; towards 0 the objective becomes InfoNCE."""
    queue_size: int = 65536
    """Teacher embeddings kept, per resolution."""
    weight: float = 1.0
    """disco: of the distance to the teacher; coss: of the space similarity; bingo: of the bag, the own embedding has the rest."""
    bag_size: int = 5
    """bingo: nearest neighbours that are positives."""
    num_clusters: int = 3000
    """k_means, online_clustering: centroids or prototypes, per resolution."""
    cluster_every: int = 100
    """k_means: steps between two runs of k-means on the queue."""
    momentum: float = 0.999
    """Share that each step keeps: of the momentum encoder in disco, of the prototypes in online_clustering."""
    hidden_dim: int | None = None
    """Hidden width of the projection head of students that name none; null = feature width of each one's encoder."""
    deep_head: bool = False
    """Whether students that do not say it get SimReg's deeper projection head."""

    def __post_init__(self) -> None:
        for option in ("tau_student", "tau_teacher", "queue_size"):
            value = getattr(self, option)
            _require(value > 0, f"objective.{option} must be positive, got {value}")
        _require(self.name != "bingo" or self.weight <= 1, f"objective.weight of bingo is a share, up to 1, got {self.weight}")
        _require(0 <= self.weight < math.inf, f"objective.weight must not be negative, got {self.weight}")
        _require(0 <= self.momentum <= 1, f"objective.momentum must be in [0, 1], got {self.momentum}")
        for option in ("bag_size", "num_clusters", "cluster_every"):
            value = getattr(self, option)
            _require(value >= 1, f"objective.{option} must be at least 1, got {value}")
        _require(
            self.hidden_dim is None or self.hidden_dim >= 1,
            f"objective.hidden_dim must be null or at least 1, got {self.hidden_dim}",
        )


@dataclass
class MocoConfig:
    temperature: float = 0.2
    """Temperature of InfoNCE."""
    momentum: float = 0.999
    """Share of the momentum encoder that each step keeps."""
    queue_size: int = 65536
    """Keys kept as negatives."""

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"moco.temperature must be positive, got {self.temperature}")
        _require(0 <= self.momentum <= 1, f"moco.momentum must be in [0, 1], got {self.momentum}")
        _require(self.queue_size > 0, f"moco.queue_size must be positive, got {self.queue_size}")


def _give_heads(students: dict[str, StudentConfig], objective: ObjectiveConfig) -> None:
    """Gives students that say nothing of their projection head the objective's."""
    for student in students.values():
        student.hidden_dim = objective.hidden_dim if student.hidden_dim is None else student.hidden_dim
        student.deep_head = objective.deep_head if student.deep_head is None else student.deep_head


@dataclass
class TrackerConfig:
    name: str = MISSING
    """Key of engine.tracking.TRACKERS; metrics.jsonl is written in any case."""
    project: str = "seed_exp"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null = the account's default."""
    group: str | None = None
    """W&B group, under which runs stand together; an experiment's is its name; null = what the run folder's name begins with."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    mode: TrackerMode = TrackerMode.auto
    """Where W&B writes."""
    artifacts: bool = False
    """Whether W&B also gets the students' files, each time that a checkpoint is written."""


@dataclass
class FitConfig:
    """What every command that trains has in common (engine.fit)."""

    run_dir: str | None = None
    """Folder of the run; null = runs/<command>/<options and their hash>. The same command resumes it."""
    seed: int = 0
    """Seeds initial weights, order of the images, every draw of the views, dropout."""
    epochs: int = 200
    """Passes over the training images."""
    steps: int | None = None
    """Optimiser steps, instead of `epochs`."""
    batch_size: int | str = 256
    """Images per optimiser step over all processes; auto = the largest power of two per process that fits into its memory."""
    accumulation: int = 1
    """Parts into which each process splits its share of the batch, to save memory."""
    precision: Precision = Precision.auto
    """Number format of the forward pass."""
    compile: bool | None = None
    """Whether networks and views are compiled (torch.compile): slower to start, faster to run; null = on a GPU."""
    device: str = "auto"
    """auto = a GPU when there is one; or cpu, cuda."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints, of which the newest two are kept; further ones are written before each evaluation."""
    max_skipped: int = 10
    """Steps of a network whose gradient is not finite that are skipped; with more it has diverged and is trained no further."""
    keep_every: int | None = None
    """Epochs between two checkpoints that are kept for good; null = none is."""
    resume: Resume = Resume.auto
    """What a checkpoint in the run's folder means: auto = go on from it, must = refuse without one, never = refuse with one."""
    eval_every: float = 10
    """Epochs between two evaluations during training, where the data has labels; 0 = only the one at the end."""
    views: ViewsConfig = MISSING
    """What is drawn from an image."""
    optimizer: OptimizerConfig = MISSING
    """How weights are updated, the same for every student."""
    data: DataConfig = MISSING
    """Where images come from."""
    tracker: TrackerConfig = MISSING
    """Where metrics go."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        for option in ("epochs", "accumulation", "log_every", "checkpoint_every"):
            value = getattr(self, option)
            _require(value >= 1, f"{option} must be at least 1, got {value}")
        valid_batch = self.batch_size == "auto" if isinstance(self.batch_size, str) else self.batch_size >= 1
        _require(valid_batch, f"batch_size must be a number of images of at least 1, or auto, got {self.batch_size}")
        _require(
            self.batch_size != "auto" or self.steps is None,
            f"steps={self.steps} of batch_size=auto would be training of unknown length; give epochs",
        )
        _require(self.steps is None or self.steps >= 1, f"steps must be null or at least 1, got {self.steps}")
        _require(self.eval_every >= 0, f"eval_every must not be negative, got {self.eval_every}")
        _require(self.max_skipped >= 0, f"max_skipped must not be negative, got {self.max_skipped}")
        _require(self.keep_every is None or self.keep_every >= 1, f"keep_every must be null or at least 1, got {self.keep_every}")


@dataclass
class EncoderFitConfig(FitConfig):
    """What the commands that train encoders have in common."""

    knn_bank_size: int = 20000
    """Labelled training images with which the k-NN evaluation during training compares, at most."""
    knn_query_size: int = 5000
    """Validation images that the k-NN evaluation during training classifies, at most."""
    students: dict[str, StudentConfig] = field(default_factory=dict)
    """Networks to train, by name: the options of the group `student`."""
    evaluations: list[str] = field(default_factory=list)
    """Evaluations of the trained students in the same job, each with options of its own: [knn, "linear lrs=[30]"]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("knn_bank_size", "knn_query_size"):
            value = getattr(self, option)
            _require(value >= 1, f"{option} must be at least 1, got {value}")
        _require(len(self.students) > 0, "no student to train; choose one, e.g. student=resnet18")
        for name, student in self.students.items():
            if student.epochs is not None:
                _require(self.steps is None, f"students.{name}.epochs={student.epochs} says nothing beside steps={self.steps}")
                _require(
                    student.epochs <= self.epochs,
                    f"students.{name}.epochs={student.epochs} exceeds epochs={self.epochs}, the length of the run; raise that",
                )


@dataclass
class DistillConfig(EncoderFitConfig):
    teacher: TeacherConfig = MISSING
    """The frozen network to learn from."""
    teacher_ssl: TeacherSSLConfig = MISSING
    """Convention of the teacher's checkpoint; each teacher brings its own."""
    objective: ObjectiveConfig = MISSING
    """What is minimised."""
    teacher_cache: str | None = None
    """Folder where the teacher's embeddings are looked for and kept, for later students of the same teacher, views and seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _give_heads(self.students, self.objective)


@dataclass
class PretrainConfig(EncoderFitConfig):
    embedding_dim: int = 128
    """Width of the embedding."""
    moco: MocoConfig = field(default_factory=MocoConfig)
    """What is minimised, and the momentum encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.embedding_dim >= 1, f"embedding_dim must be at least 1, got {self.embedding_dim}")
        num = self.views.crops["global"].num
        _require(num == 2, f"pretrain needs two global views of an image, a query and a key; views.crops.global.num is {num}")
        _require_global_only(self.views, "pretrain")


@dataclass
class OfRunConfig:
    """What the commands on trained students have in common."""

    run: str = MISSING
    """Run folder of `distill` or `pretrain`, or a student file of one."""
    networks: list[str] | None = None
    """Which students of the run; null = all."""

    def __post_init__(self) -> None:
        _require(self.networks != [], "networks=[] names no student; name some, or null for all")


@dataclass
class LinearConfig(FitConfig, OfRunConfig):
    lrs: list[float] = field(default_factory=list)
    """Learning rates (at a batch of 256, times optimizer.lr) of the classifiers trained side by side on the same features."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        OfRunConfig.__post_init__(self)
        _require(len(self.lrs) > 0 and min(self.lrs) > 0, f"lrs must be one or more positive learning rates, got {self.lrs}")
        num = self.views.crops["global"].num
        _require(num == 1, f"linear evaluation uses one view of an image; views.crops.global.num is {num}")
        _require_global_only(self.views, "linear")


@dataclass
class FinetuneConfig(FitConfig, OfRunConfig):
    lrs: list[float] = field(default_factory=list)
    """Learning rates (at a batch of 256, times optimizer.lr) of the encoders, copies of each student trained side by side."""
    classifier_lr_factor: float = 20.0
    """Learning rate of the new classifier as a multiple of its encoder's; other than 1, it needs optimizer.weight_decay=0."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        OfRunConfig.__post_init__(self)
        _require(len(self.lrs) > 0 and min(self.lrs) > 0, f"lrs must be one or more positive learning rates, got {self.lrs}")
        factor, decay = self.classifier_lr_factor, self.optimizer.weight_decay
        _require(factor > 0, f"classifier_lr_factor must be positive, got {factor}")
        _require(
            factor == 1 or decay == 0,
            f"optimizer.weight_decay={decay} would not decay a classifier that learns {factor:g} times as fast by as much; "
            "use optimizer.weight_decay=0 or classifier_lr_factor=1",
        )
        _require(
            self.optimizer.name == "sgd",
            f"finetune trains classifiers at rates of their own, which needs optimizer.name=sgd, got {self.optimizer.name}",
        )
        num = self.views.crops["global"].num
        _require(num == 1, f"fine-tuning uses one view of an image; views.crops.global.num is {num}")
        _require_global_only(self.views, "finetune")


@dataclass
class DetectConfig(FitConfig, OfRunConfig):
    detector: str = "fpn"
    """Key of models.detectors.DETECTORS: fpn, a feature pyramid; or c4, for ResNets, whose last stage becomes the head."""
    masks: bool = False
    """Mask R-CNN, which also says each object's pixels; needs data that has them (coco). Otherwise Faster R-CNN."""
    short_sides: list[int] = field(default_factory=list)
    """Pixels to which the shorter side of training images is resized, one of them at random; the largest one in evaluation."""
    long_side: int = 1333
    """Pixels that the longer side is not to exceed."""
    freeze_bn: bool = False
    """Whether the encoder's batch norm keeps its running statistics, scales and shifts."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        OfRunConfig.__post_init__(self)
        sides = self.short_sides
        _require(len(sides) > 0 and min(sides) >= 32, f"short_sides must be one or more sizes of at least 32 pixels, got {sides}")
        _require(self.long_side >= max(sides), f"long_side={self.long_side} is below the largest of short_sides={sides}")
        _require(self.compile is False, f"detect does not compile: its images have different sizes; got compile={self.compile}")
        _require(
            self.precision is Precision.float32,
            f"detect needs precision=float32, got {self.precision.value}: bfloat16 would round boxes to several pixels",
        )


@dataclass
class KnnConfig(OfRunConfig):
    ks: list[int] = field(default_factory=lambda: [10, 20, 200])
    """Numbers of neighbours; majority and weighted votes are reported for each."""
    temperature: float = 0.07
    """Temperature of the weighted vote."""
    batch_size: int = 256
    """Images per forward pass."""
    device: str = "auto"
    """auto = a GPU when there is one; or cpu, cuda."""
    precision: Precision = Precision.auto
    """Number format of the forward pass."""
    data: DataConfig = MISSING
    """Where labelled images come from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(len(self.ks) > 0 and min(self.ks) > 0, f"ks must be one or more numbers of neighbours above 0, got {self.ks}")
        _require(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        _require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")


@dataclass
class PreviewConfig:
    views: ViewsConfig = MISSING
    """The recipe to show."""
    data: DataConfig = MISSING
    """Where images come from."""
    seed: int = 0
    """Seeds every draw of the views."""
    epoch: int = 0
    """Epoch whose views are shown."""
    num_images: int = 8
    """Rows of the picture."""
    output: str = "preview.png"
    """Where the picture is written."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        _require(self.epoch >= 0, f"epoch must not be negative, got {self.epoch}")
        _require(self.num_images >= 1, f"num_images must be at least 1, got {self.num_images}")


@dataclass
class QuickstartConfig:
    run_dir: str = "runs/quickstart"
    """Folder of the three runs, the table and the picture; an interrupted quickstart goes on there."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each seed repeats everything, teacher included; the table then has means, and the spread of SEED's gain."""
    steps: int = 600
    """Optimiser steps of each of the three trainings."""

    def __post_init__(self) -> None:
        _require(len(self.seeds) > 0, "seeds must name at least one seed, e.g. seeds=[0]")
        _require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")


@dataclass
class BenchConfig:
    bench: str = MISSING
    """Key of bench.BENCHES: what is measured."""
    seconds: float = 60
    """Time that the measurement takes, beside its warm-up."""
    batch_size: int = 32
    """Images per repetition."""
    rows: int = 256
    """loss: embeddings compared with the queue, images x views."""
    bank_size: int = 100000
    """knn: features that are searched."""
    query_size: int = 2000
    """knn: features whose neighbours are looked for."""
    feature_dim: int = 512
    """knn: their width."""
    k: int = 20
    """knn: neighbours of each."""
    processes: int = 2
    """scaling: how many train together."""
    threads: int | None = None
    """CPU threads; null = as many as PyTorch takes by itself; scaling: of each process, null = 1."""
    device: str = "auto"
    """auto = a GPU when there is one; or cpu, cuda."""
    precision: Precision = Precision.auto
    """Number format of our forward passes; the plain ones are float32 on a CPU, float16 on a GPU."""
    compile: bool | None = None
    """Whether our networks are compiled; null = on a GPU."""
    json: bool = False
    """Prints JSON instead of a table; also --json."""
    students: dict[str, StudentConfig] = field(default_factory=dict)
    """Networks to train, by name: the options of the group `student`."""
    teacher: TeacherConfig = MISSING
    """The frozen network, with random weights."""
    teacher_ssl: TeacherSSLConfig = MISSING
    """Convention of the teacher's checkpoint, which says what head it has."""
    objective: ObjectiveConfig = MISSING
    """What is minimised, and the size of the queue."""
    optimizer: OptimizerConfig = MISSING
    """How weights are updated."""
    views: ViewsConfig = MISSING
    """What is drawn from an image."""
    data: DataConfig = MISSING
    """Where the images of `bench=views` come from; the other benches make their own."""

    def __post_init__(self) -> None:
        _require(self.seconds >= 0, f"seconds must not be negative, got {self.seconds}")
        for option in ("batch_size", "rows", "bank_size", "query_size", "feature_dim", "k"):
            value = getattr(self, option)
            _require(value >= 1, f"{option} must be at least 1, got {value}")
        _give_heads(self.students, self.objective)
        _require(self.processes >= 2, f"processes must be at least 2, got {self.processes}")
        _require(self.threads is None or self.threads >= 1, f"threads must be null or at least 1, got {self.threads}")
        _require(len(self.students) > 0, "no student to train; choose one, e.g. student=resnet18")


@dataclass
class ConvertConfig:
    data: DataConfig = MISSING
    """Where the images come from."""
    split: SplitName = SplitName.train
    """Which of them."""
    to: DataFormat = MISSING
    """What they become."""
    output: str = MISSING
    """Folder of the result, to be read with data=<to> data.root=<output>; both splits may go into the same one."""
    shard_size: int = 10000
    """to=shards: images per file."""

    def __post_init__(self) -> None:
        _require(self.shard_size >= 1, f"shard_size must be at least 1, got {self.shard_size}")


@dataclass
class ExportConfig(OfRunConfig):
    formats: list[str] | None = None
    """Keys of exporting.formats.FORMATS; null = all that the network has."""
    output: str | None = None
    """Folder in which each network gets one of its own; null = export/ in the run's folder."""
    head: bool = False
    """Whether onnx and torch_export give embeddings too, the output of the projection head."""
    push: str | None = None
    """OWNER/NAME of a repository on the Hugging Face hub to which the network's folder is uploaded; null = it stays here."""
    data: DataConfig = MISSING
    """Images on which each exported file must give the features of the run's own network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.formats != [], "formats=[] leaves nothing to export; name some, or null for all")


@dataclass
class EmbedConfig(OfRunConfig):
    split: SplitName = SplitName.train
    """Which of the images."""
    output: str = "features.parquet"
    """File of the features; its ending says the format: .parquet or .npz."""
    head: bool = False
    """Embeddings, the output of the projection head, instead of features."""
    dtype: FeatureType = FeatureType.float32
    """Number format in the file."""
    gallery: str | None = None
    """HTML page of images with their nearest neighbours; null = none."""
    neighbours: int = 8
    """gallery: neighbours of each query."""
    query: list[str] | None = None
    """gallery: image files whose neighbours are looked for; null = images spread over the data."""
    num_queries: int = 12
    """gallery: how many images are spread over the data."""
    duplicates: float | None = None
    """Cosine from which on two images count as near-duplicates, whose groups are listed beside the output; null = none are."""
    batch_size: int = 256
    """Images per forward pass."""
    device: str = "auto"
    """auto = a GPU when there is one; or cpu, cuda."""
    precision: Precision = Precision.auto
    """Number format of the forward pass."""
    data: DataConfig = MISSING
    """Where the images come from; they need no labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("neighbours", "num_queries", "batch_size"):
            value = getattr(self, option)
            _require(value >= 1, f"{option} must be at least 1, got {value}")
        _require(
            self.query is None or self.gallery is not None, "query=[...] needs gallery=PAGE.html, which shows its neighbours"
        )
        _require(
            self.duplicates is None or 0 < self.duplicates <= 1,
            f"duplicates must be a cosine above 0 and up to 1, got {self.duplicates}",
        )


@dataclass
class VerifyConfig:
    data: DataConfig = MISSING
    """Where the images come from."""
    split: SplitName | None = None
    """Which of them; null = all."""
    output: str = "verify-report.jsonl"
    """Where the images that cannot be read are listed."""


@dataclass
class ReportConfig:
    runs: list[str] = field(default_factory=lambda: ["runs"])
    """Folders at and below which run folders are looked for."""
    sweeps: list[str] = field(default_factory=list)
    """What the table is about, each as it is typed: "distill experiments=table1 seed=0,1,2"; [] = the runs that are found."""
    output: str = "report"
    """Folder of the page and the tables."""
    title: str = "Self-supervised distillation"
    """Heading of the page."""

    def __post_init__(self) -> None:
        _require(len(self.runs) > 0, "runs=[] leaves nothing to report; name at least one folder")
