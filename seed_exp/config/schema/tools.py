"""Options of the other commands."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from seed_exp.config.schema.enums import DataFormat, FeatureType, Precision, SplitName
from seed_exp.config.schema.evaluation import OfRunConfig
from seed_exp.config.schema.objectives import ObjectiveConfig, give_heads
from seed_exp.config.schema.parts import (
    DataConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    TeacherSSLConfig,
    ViewsConfig,
    require,
)


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
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        require(self.epoch >= 0, f"epoch must not be negative, got {self.epoch}")
        require(self.num_images >= 1, f"num_images must be at least 1, got {self.num_images}")


@dataclass
class QuickstartConfig:
    run_dir: str = "runs/quickstart"
    """Folder of the three runs, the table and the picture; an interrupted quickstart goes on there."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each seed repeats everything, teacher included; the table then has means, and the spread of SEED's gain."""
    steps: int = 600
    """Optimiser steps of each of the three trainings."""

    def __post_init__(self) -> None:
        require(len(self.seeds) > 0, "seeds must name at least one seed, e.g. seeds=[0]")
        require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")


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
        require(self.seconds >= 0, f"seconds must not be negative, got {self.seconds}")
        for option in ("batch_size", "rows", "bank_size", "query_size", "feature_dim", "k"):
            value = getattr(self, option)
            require(value >= 1, f"{option} must be at least 1, got {value}")
        give_heads(self.students, self.objective)
        require(self.processes >= 2, f"processes must be at least 2, got {self.processes}")
        require(
            self.threads is None or self.threads >= 1,
            f"threads must be null or at least 1, got {self.threads}",
        )
        require(len(self.students) > 0, "no student to train; choose one, e.g. student=resnet18")


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
        require(self.shard_size >= 1, f"shard_size must be at least 1, got {self.shard_size}")


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
        require(
            self.formats != [], "formats=[] leaves nothing to export; name some, or null for all"
        )


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
        require(len(self.runs) > 0, "runs=[] leaves nothing to report; name at least one folder")
