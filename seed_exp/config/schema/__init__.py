"""Every option of every command: name, type, default, meaning, unit.

The values of config groups are in conf/. Checks in `__post_init__` run when `typed()` turns the
composed config into these classes, before anything starts.
"""

from __future__ import annotations

from typing import Any

from seed_exp.config.schema.enums import (
    DataFormat,
    FeatureType,
    OnError,
    Precision,
    QueueInit,
    Reduce,
    Resume,
    ScheduleName,
    SplitName,
    TrackerMode,
)
from seed_exp.config.schema.evaluation import (
    EVALUATIONS,
    DetectConfig,
    EvaluationKind,
    FinetuneConfig,
    KnnConfig,
    LinearConfig,
    Measure,
    OfRunConfig,
)
from seed_exp.config.schema.objectives import (
    OBJECTIVE_CONFIGS,
    BinaryContrastiveConfig,
    BingoConfig,
    ClusteringConfig,
    CompressConfig,
    CossConfig,
    DiscoConfig,
    InfoNCEConfig,
    KMeansConfig,
    L2Config,
    ObjectiveConfig,
    OnlineClusteringConfig,
    PairwiseConfig,
    SeedConfig,
    SeedStrongConfig,
    SimRegConfig,
)
from seed_exp.config.schema.parts import (
    CropConfig,
    DataConfig,
    MocoConfig,
    OptimizerConfig,
    StudentConfig,
    TeacherConfig,
    TeacherSSLConfig,
    TrackerConfig,
    ViewsConfig,
)
from seed_exp.config.schema.tools import (
    BenchConfig,
    ConvertConfig,
    EmbedConfig,
    ExportConfig,
    PreviewConfig,
    QuickstartConfig,
    ReportConfig,
    VerifyConfig,
)
from seed_exp.config.schema.training import (
    TRAINING,
    DistillConfig,
    EncoderFitConfig,
    FitConfig,
    PretrainConfig,
)

SCHEMAS: dict[str, type[Any]] = {
    "distill": DistillConfig,
    "pretrain": PretrainConfig,
    **{name: kind.schema for name, kind in EVALUATIONS.items()},
    "preview": PreviewConfig,
    "quickstart": QuickstartConfig,
    "bench": BenchConfig,
    "convert": ConvertConfig,
    "verify": VerifyConfig,
    "export": ExportConfig,
    "embed": EmbedConfig,
    "report": ReportConfig,
}
"""Schema of each command's primary file conf/<command>.yaml."""
WITHOUT_SCHEMA = ("plan", "sweep", "zoo")
"""Commands without a primary file: two take the options of a training, `zoo` has none."""

__all__ = [
    "EVALUATIONS",
    "OBJECTIVE_CONFIGS",
    "SCHEMAS",
    "TRAINING",
    "WITHOUT_SCHEMA",
    "BenchConfig",
    "BinaryContrastiveConfig",
    "BingoConfig",
    "ClusteringConfig",
    "CompressConfig",
    "ConvertConfig",
    "CossConfig",
    "CropConfig",
    "DataConfig",
    "DataFormat",
    "DetectConfig",
    "DiscoConfig",
    "DistillConfig",
    "EmbedConfig",
    "EncoderFitConfig",
    "EvaluationKind",
    "ExportConfig",
    "FeatureType",
    "FinetuneConfig",
    "FitConfig",
    "InfoNCEConfig",
    "KMeansConfig",
    "KnnConfig",
    "L2Config",
    "LinearConfig",
    "Measure",
    "MocoConfig",
    "ObjectiveConfig",
    "OfRunConfig",
    "OnError",
    "OnlineClusteringConfig",
    "OptimizerConfig",
    "PairwiseConfig",
    "Precision",
    "PretrainConfig",
    "PreviewConfig",
    "QueueInit",
    "QuickstartConfig",
    "Reduce",
    "ReportConfig",
    "Resume",
    "ScheduleName",
    "SeedConfig",
    "SeedStrongConfig",
    "SimRegConfig",
    "SplitName",
    "StudentConfig",
    "TeacherConfig",
    "TeacherSSLConfig",
    "TrackerConfig",
    "TrackerMode",
    "VerifyConfig",
    "ViewsConfig",
]
