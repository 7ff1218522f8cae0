"""Options of the commands that train encoders."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from seed_exp.config.schema.enums import Precision, Resume
from seed_exp.config.schema.networks import StudentConfig, TeacherConfig, TeacherSSLConfig
from seed_exp.config.schema.objectives import ObjectiveConfig, give_heads
from seed_exp.config.schema.parts import (
    DataConfig,
    MocoConfig,
    OptimizerConfig,
    TrackerConfig,
    ViewsConfig,
    require,
    require_global_only,
    require_unmixed,
)
from seed_exp.config.schema.resolution import require_within

TRAINING = ("distill", "pretrain")
"""Commands that train encoders."""


@dataclass
class FitConfig:
    """Options that all training commands share (engine.fit)."""

    run_dir: str | None = None
    """Run folder, resumed by the same command; null = `runs/<command>/<label and hash>`."""
    seed: int = 0
    """Seed of initial weights, image order, views and dropout."""
    epochs: int = 200
    """Passes over the training images."""
    steps: int | None = None
    """Optimiser steps, instead of `epochs`."""
    batch_size: int | str = 256
    """Images per optimiser step over all processes; auto = largest power of two that fits."""
    accumulation: int = 1
    """Parts into which each process splits its share of the batch to save memory."""
    precision: Precision = Precision.auto
    """Number format of the forward pass; auto = chosen for the device, in trainings per network."""
    compile: bool | None = None
    """torch.compile of networks and views: slower to start, faster to run; null = on a GPU."""
    deterministic: bool = False
    """Whether a GPU computes the same bits each time: slower, and not quite the bits of false."""
    device: str = "auto"
    """Device: auto = a GPU if there is one; or cpu, cuda."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints, also written before evaluations; the newest two are kept."""
    max_skipped: int = 10
    """Steps with a non-finite gradient that a network may skip; with more it has diverged."""
    keep_every: int | None = None
    """Epochs between two checkpoints that are kept for good; null = none."""
    resume: Resume = Resume.auto
    """Checkpoint in the run folder: auto = resume, must = refuse without, never = refuse with."""
    eval_every: float = 10
    """Epochs between two evaluations, if the data has labels; 0 = only at the end."""
    views: ViewsConfig = MISSING
    """Recipe of the views of an image."""
    optimizer: OptimizerConfig = MISSING
    """Optimiser of the weights, the same for every student."""
    data: DataConfig = MISSING
    """Source of the images."""
    tracker: TrackerConfig = MISSING
    """Tracker of the metrics."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        for option in ("epochs", "accumulation", "log_every", "checkpoint_every"):
            value = getattr(self, option)
            require(value >= 1, f"{option} must be at least 1, got {value}")
        valid_batch = (
            self.batch_size == "auto" if isinstance(self.batch_size, str) else self.batch_size >= 1
        )
        require(
            valid_batch,
            f"batch_size must be a number of images of at least 1, or auto, got {self.batch_size}",
        )
        require(
            self.batch_size != "auto" or self.steps is None,
            f"steps={self.steps} of batch_size=auto would be training of unknown length; "
            "give epochs",
        )
        require(
            self.steps is None or self.steps >= 1,
            f"steps must be null or at least 1, got {self.steps}",
        )
        require(self.eval_every >= 0, f"eval_every must not be negative, got {self.eval_every}")
        require(self.max_skipped >= 0, f"max_skipped must not be negative, got {self.max_skipped}")
        require(
            self.keep_every is None or self.keep_every >= 1,
            f"keep_every must be null or at least 1, got {self.keep_every}",
        )


@dataclass
class EncoderFitConfig(FitConfig):
    """Options that the commands that train encoders share."""

    knn_bank_size: int = 20000
    """Labelled training images that k-NN during training searches, at most."""
    knn_query_size: int = 5000
    """Validation images that k-NN during training classifies, at most."""
    students: dict[str, StudentConfig] = field(default_factory=dict)
    """Networks to train, by name; each has the options of the group student."""
    ema_decay: float | None = None
    """Share that each step keeps of an average of a student's weights, NAME_ema; null = none."""
    evaluations: list[str] = field(default_factory=list)
    """Evaluations after training, each with its own options: [knn, "linear lrs=[30]"]."""
    command: str | None = None
    """Command that the experiment is written for, set by its file; null = any that trains."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("knn_bank_size", "knn_query_size"):
            value = getattr(self, option)
            require(value >= 1, f"{option} must be at least 1, got {value}")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            f"ema_decay must be null or between 0 and 1, such as 0.999, got {self.ema_decay}",
        )
        require(len(self.students) > 0, "no student to train; choose one, e.g. student=resnet18")
        if self.views.resolution is not None:
            unit, end = ("steps", self.steps) if self.steps else ("epochs", self.epochs)
            require_within(self.views.resolution, end, unit)
        for name, student in self.students.items():
            if student.epochs is not None:
                require(
                    self.steps is None,
                    f"students.{name}.epochs={student.epochs} says nothing beside "
                    f"steps={self.steps}",
                )
                require(
                    student.epochs <= self.epochs,
                    f"students.{name}.epochs={student.epochs} exceeds epochs={self.epochs}, "
                    "the length of the run; raise that",
                )


def require_command(written_for: str | None, command: str) -> None:
    """Refuses an experiment of another command, which would train something else under its name."""
    require(
        written_for in (None, *TRAINING),
        f"command must be null or one of {', '.join(TRAINING)}, got {written_for}",
    )
    require(
        written_for in (None, command),
        f"the experiment is written for {written_for}, not for {command}: "
        f"type python -m seed_exp.{written_for}, or --command {written_for} after sweep and plan",
    )


@dataclass
class DistillConfig(EncoderFitConfig):
    teacher: TeacherConfig = MISSING
    """Frozen network to learn from."""
    teacher_ssl: TeacherSSLConfig = MISSING
    """Checkpoint convention of the teacher; each teacher brings its own."""
    objective: ObjectiveConfig = MISSING
    """Loss to minimise, with its options."""
    teacher_cache: str | None = None
    """Folder of teacher embeddings; in it a sub-folder for each teacher, views, data and seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_command(self.command, "distill")
        give_heads(self.students, self.objective)
        if self.objective.has_batch_teacher:
            for option, value in (
                ("teacher_cache", self.teacher_cache),
                ("teacher.reduce", self.teacher.reduce and self.teacher.reduce.value),
            ):
                require(
                    value is None,
                    f"{option}={value} needs a teacher whose embedding of an image depends on "
                    "nothing else, unlike objective.teacher_statistics=batch; "
                    "leave one of them out",
                )

    def sized_for(self, num_images: int) -> DistillConfig:
        """The options with the number that objective.queue_size=auto stands for.

        Errors as `ObjectiveConfig.sized_for`.
        """
        return replace(self, objective=self.objective.sized_for(num_images))


@dataclass
class PretrainConfig(EncoderFitConfig):
    embedding_dim: int = 128
    """Width of the embedding."""
    moco: MocoConfig = field(default_factory=MocoConfig)
    """Contrastive loss and momentum encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_command(self.command, "pretrain")
        require(
            self.embedding_dim >= 1, f"embedding_dim must be at least 1, got {self.embedding_dim}"
        )
        num = self.views.crops["global"].num
        require(
            num == 2,
            "pretrain needs two global views of an image, a query and a key; "
            f"views.crops.global.num is {num}",
        )
        require_global_only(self.views, "pretrain")
        reason = "its two views of an image would be mixed in two proportions"
        require_unmixed(self.views, "pretrain", reason)

    def sized_for(self, num_images: int) -> PretrainConfig:
        """The options with the number that moco.queue_size=auto stands for."""
        return replace(self, moco=self.moco.sized_for(num_images))
