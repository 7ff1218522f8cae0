"""Options that take one of a few names."""

from __future__ import annotations

from enum import Enum


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


OnError = Enum(
    "OnError", {"skip": "skip", "raise": "raise"}
)  # not a class: `raise` is no name in Python
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
