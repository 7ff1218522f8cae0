"""Options of the commands that neither train nor evaluate."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from seed_exp.config.schema.enums import DataFormat, FeatureType, Precision, SplitName
from seed_exp.config.schema.evaluation import OfRunConfig
from seed_exp.config.schema.networks import StudentConfig, TeacherConfig, TeacherSSLConfig
from seed_exp.config.schema.objectives import ObjectiveConfig, give_heads
from seed_exp.config.schema.parts import (
    DataConfig,
    OptimizerConfig,
    ViewsConfig,
    require,
    require_one_size,
)


@dataclass
class PreviewConfig:
    views: ViewsConfig = MISSING
    """Recipe of the views to show."""
    data: DataConfig = MISSING
    """Source of the images."""
    seed: int = 0
    """Seed of every draw of the views."""
    epoch: int = 0
    """Epoch whose views are shown."""
    num_images: int = 8
    """Images, each a row of the picture."""
    output: str = "preview.png"
    """File of the picture."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        require(self.epoch >= 0, f"epoch must not be negative, got {self.epoch}")
        require(self.num_images >= 1, f"num_images must be at least 1, got {self.num_images}")


@dataclass
class QuickstartConfig:
    run_dir: str = "runs/quickstart"
    """Folder of runs, table and picture; the same command resumes an interrupted quickstart."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Seeds, each of which repeats everything; several give means and standard deviations."""
    steps: int = 600
    """Optimiser steps of each of the three runs."""

    def __post_init__(self) -> None:
        require(len(self.seeds) > 0, "seeds must name at least one seed, e.g. seeds=[0]")
        require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")


@dataclass
class BenchConfig:
    bench: str = MISSING
    """Key of tools.bench.BENCHES: what is measured."""
    run: str | None = None
    """latency: run folder or student file; null = a student with random weights."""
    networks: list[str] | None = None
    """latency: name of the student of the run; null = its only one."""
    seconds: float = 60
    """Seconds of measurement, after the warm-up."""
    batch_size: int = 32
    """Images per repetition."""
    rows: int = 256
    """loss: embeddings compared with the queue (images x views)."""
    bank_size: int = 100000
    """knn: features to search."""
    query_size: int = 2000
    """knn: features whose neighbours are searched."""
    feature_dim: int = 512
    """knn: width of a feature."""
    k: int = 20
    """knn: neighbours of each query."""
    processes: int = 2
    """scaling: processes that train together."""
    threads: int | None = None
    """CPU threads (scaling: of each process); null = as PyTorch; scaling: 1; latency: 1 and all."""
    device: str = "auto"
    """Device: auto = a GPU if there is one; or cpu, cuda."""
    precision: Precision = Precision.auto
    """Number format of our forward passes; plain ones: float32 on a CPU, float16 on a GPU."""
    compile: bool | None = None
    """Whether our networks are compiled; null = on a GPU; latency measures both unless false."""
    json: bool = False
    """Whether JSON is printed instead of a table; also --json."""
    students: dict[str, StudentConfig] = field(default_factory=dict)
    """Networks to train, by name; each has the options of the group student."""
    teacher: TeacherConfig = MISSING
    """Frozen network, with random weights."""
    teacher_ssl: TeacherSSLConfig = MISSING
    """Checkpoint convention of the teacher, which says what head it has."""
    objective: ObjectiveConfig = MISSING
    """Loss to minimise, with its options."""
    optimizer: OptimizerConfig = MISSING
    """Optimiser of the weights."""
    views: ViewsConfig = MISSING
    """Recipe of the views of an image."""
    data: DataConfig = MISSING
    """views: source of the images; other benches make their own."""

    def __post_init__(self) -> None:
        require(self.seconds >= 0, f"seconds must not be negative, got {self.seconds}")
        for option in ("batch_size", "rows", "bank_size", "query_size", "feature_dim", "k"):
            value = getattr(self, option)
            require(value >= 1, f"{option} must be at least 1, got {value}")
        give_heads(self.students, self.objective)
        require_one_size(self.views, "bench")
        require(self.processes >= 2, f"processes must be at least 2, got {self.processes}")
        require(
            self.threads is None or self.threads >= 1,
            f"threads must be null or at least 1, got {self.threads}",
        )
        require(len(self.students) > 0, "no student to train; choose one, e.g. student=resnet18")


@dataclass
class ConvertConfig:
    data: DataConfig = MISSING
    """Source of the images."""
    split: SplitName = SplitName.train
    """Split to convert."""
    to: DataFormat = MISSING
    """Target format."""
    output: str = MISSING
    """Folder of the result, for both splits; read it with `data=<to> data.root=<output>`."""
    shard_size: int = 10000
    """to=shards: images per file."""
    size: int | None = None
    """Pixels of the shorter side of images that have more; null = files stay as they are."""
    quality: int = 90
    """Quality of the JPEG files that `size` writes, 1 to 100."""

    def __post_init__(self) -> None:
        require(self.shard_size >= 1, f"shard_size must be at least 1, got {self.shard_size}")
        require(self.size is None or self.size >= 8, f"size must be at least 8, got {self.size}")
        require(1 <= self.quality <= 100, f"quality must be 1 to 100, got {self.quality}")
        require(
            self.size is not None or self.quality == ConvertConfig.quality,
            f"quality={self.quality} is for images that size=N makes smaller; give size too",
        )


@dataclass
class ExportConfig(OfRunConfig):
    formats: list[str] | None = None
    """Keys of exporting.formats.FORMATS; null = all that the network has, in float32."""
    output: str | None = None
    """Folder with a subfolder for each network; null = export/ in the run folder."""
    head: bool = False
    """Whether onnx and torch_export also return embeddings (output of the projection head)."""
    maps: bool = False
    """Whether onnx and torch_export also return feature maps [N, C, H, W], as before pooling."""
    push: str | None = None
    """OWNER/NAME of a Hugging Face repository to upload the network to; null = no upload."""
    calibration_images: int = 256
    """onnx_int8: training images with which the ranges of activations are measured, at most."""
    min_cosine: float | None = None
    """Smallest mean cosine of features in fewer bits; null = 0.999 for onnx_fp16, 0.95 for int8."""
    max_knn_drop: float = 2.0
    """Percentage points of k-NN accuracy that a format of fewer bits may lose."""
    knn_bank_size: int = 5000
    """Formats of fewer bits: labelled training images that k-NN searches, at most."""
    knn_query_size: int = 1000
    """Formats of fewer bits: images whose features are compared and that k-NN classifies."""
    data: DataConfig = MISSING
    """Images on which each exported file must reproduce the features of the run's network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.formats != [], "formats=[] leaves nothing to export; name some, or null for all"
        )
        for option in ("calibration_images", "knn_bank_size", "knn_query_size"):
            value = getattr(self, option)
            require(value >= 1, f"{option} must be at least 1, got {value}")
        require(
            self.min_cosine is None or -1 <= self.min_cosine <= 1,
            f"min_cosine must be null or a cosine from -1 to 1, got {self.min_cosine}",
        )
        require(
            self.max_knn_drop >= 0, f"max_knn_drop must not be negative, got {self.max_knn_drop}"
        )


@dataclass
class EmbedConfig(OfRunConfig):
    split: SplitName = SplitName.train
    """Split to embed."""
    output: str = "features.parquet"
    """File of the features, .parquet or .npz."""
    head: bool = False
    """Whether to write embeddings (output of the projection head) instead of features."""
    dtype: FeatureType = FeatureType.float32
    """Number format of the file."""
    gallery: str | None = None
    """HTML page to write of images with their nearest neighbours; null = none."""
    neighbours: int = 8
    """gallery: neighbours of each query."""
    query: list[str] | None = None
    """gallery: query image files; null = images evenly spaced over the data."""
    num_queries: int = 12
    """gallery: number of evenly spaced query images."""
    duplicates: float | None = None
    """Smallest cosine of near-duplicates, which are listed beside the output; null = no list."""
    recalibrate_bn: bool = False
    """Whether batch norm's statistics are first measured on training images, as PreciseBN does."""
    batch_size: int = 256
    """Images per forward pass."""
    device: str = "auto"
    """Device: auto = a GPU if there is one; or cpu, cuda."""
    precision: Precision = Precision.auto
    """Number format of the forward pass."""
    data: DataConfig = MISSING
    """Source of the images; they need no labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("neighbours", "num_queries", "batch_size"):
            value = getattr(self, option)
            require(value >= 1, f"{option} must be at least 1, got {value}")
        require(
            self.query is None or self.gallery is not None,
            "query=[...] needs gallery=PAGE.html, which shows its neighbours",
        )
        require(
            self.duplicates is None or 0 < self.duplicates <= 1,
            f"duplicates must be a cosine above 0 and up to 1, got {self.duplicates}",
        )


@dataclass
class VerifyConfig:
    data: DataConfig = MISSING
    """Source of the images."""
    split: SplitName | None = None
    """Split to check; null = all."""
    output: str = "verify-report.jsonl"
    """File that lists the unreadable images."""


@dataclass
class ReportConfig:
    runs: list[str] = field(default_factory=lambda: ["runs"])
    """Folders to search for run folders, at any depth."""
    sweeps: list[str] = field(default_factory=list)
    """Sweeps of the table, each as typed ("distill experiments=table1"); [] = all runs found."""
    output: str = "report"
    """Folder of the page and the tables."""
    title: str = "Self-supervised distillation"
    """Title of the page."""

    def __post_init__(self) -> None:
        require(len(self.runs) > 0, "runs=[] leaves nothing to report; name at least one folder")
