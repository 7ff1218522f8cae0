"""Options that take one of a few names."""

from __future__ import annotations

from enum import Enum


class Precision(Enum):
    """Number format of the forward pass; weights and losses are float32 in either case."""

    # bfloat16 on a GPU since Ampere, and of a training's networks those that gain by it on a CPU
    # with bfloat16 units (models.cpu_precision); otherwise float32
    auto = "auto"
    float32 = "float32"  # without TF32, on a GPU too
    bfloat16 = "bfloat16"


class ScheduleName(Enum):
    """Course of the learning rate from its peak to the end of training."""

    cosine = "cosine"
    step = "step"
    constant = "constant"


class Resume(Enum):
    """Treatment of a checkpoint in the run folder."""

    auto = "auto"  # goes on from it
    never = "never"  # refuses to start where there is one
    must = "must"  # refuses to start where there is none


OnError = Enum(
    "OnError", {"skip": "skip", "raise": "raise"}
)  # not a class: `raise` is no name in Python
"""What happens to an image that cannot be read.

`skip` replaces it by the next good one and lists it; `raise` ends the command.
"""


class SplitName(Enum):
    """Split of a data set."""

    train = "train"
    val = "val"


class GallerySplit(Enum):
    """Images that retrieval searches."""

    train = "train"  # all training images
    val = "val"  # all validation images but the query


class DataFormat(Enum):
    """Format to which images can be converted."""

    tsv = "tsv"
    image_folder = "image_folder"
    shards = "shards"


class Reduce(Enum):
    """Fixed map of a teacher's embeddings, fitted before training.

    `pca` and `whiten` project onto principal components, which makes embeddings narrower.
    `standardize` and `phi_s` keep their width.
    """

    pca = "pca"  # keeps the proportions of the components
    whiten = "whiten"  # gives all of them the same variance
    standardize = "standardize"  # mean 0 and standard deviation 1 in each dimension
    phi_s = "phi_s"  # the same by a rotation and one factor, which keep all angles


TeacherEmbedding = Enum(
    "TeacherEmbedding",
    {
        "head": "head",
        "features": "features",
        "cls": "cls",
        "mean_patch": "mean_patch",
        "cls+mean_patch": "cls+mean_patch",
    },
)  # not a class: `cls+mean_patch` is no name in Python
"""Output of a teacher that students learn, at unit length.

`head` is behind its projection head, if it has one. `features` is the pooled encoder output. The
others are of vision transformers: the class token, the mean of the patches, both side by side.
"""


class TeacherStatistics(Enum):
    """Statistics by which a teacher's batch norm normalises."""

    running = "running"  # those of its training
    batch = "batch"  # those of the images at hand, as in DisCo's and BINGO's released code


class QueueInit(Enum):
    """Content of the queue before the first step."""

    random = "random"  # random unit vectors, as in the released code
    teacher = "teacher"  # the teacher's embeddings of random training images


class NeighboursPer(Enum):
    """Part of a training that one calibrated temperature of the teacher serves."""

    run = "run"  # all of it: found before the first step
    row = "row"  # one view: found in each step


class FeatureType(Enum):
    """Number format of stored features."""

    float32 = "float32"
    float16 = "float16"


class TrackerMode(Enum):
    """Where W&B writes.

    `auto` is online when logged in and the server answers, otherwise offline.
    """

    auto = "auto"
    offline = "offline"
