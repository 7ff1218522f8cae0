"""Options of students and teachers."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from seed_exp.config.schema.enums import Reduce, TeacherEmbedding
from seed_exp.config.schema.parts import require

RELEASED_NETWORKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenetv3_large",
    "efficientnet_b0",
    "efficientnet_b1",
)
"""Keys of models.students.STUDENTS that SEED released."""
INIT_RULES = ("timm", "released")
"""Values of `students.<name>.init_rule`."""
PLACE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
"""A custom network's place, module:function."""
RESERVED_ARGS = (
    *("model_name", "checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit"),
    *("num_classes", "in_chans", "features_only", "feature_cls", "out_indices"),
)
"""Arguments of timm.create_model that are not the user's, besides all that begin with pretrained.

They read files, or make the network something else than an encoder.
"""


@dataclass
class StudentConfig:
    network: str = MISSING
    """Key of models.students.STUDENTS, or module:function, a factory of yours (student=custom)."""
    name: str | None = None
    """network=timm: model name in timm, which is the student's name too; student=timm/NAME."""
    hidden_dim: int | None = None
    """Hidden width of the head; 0 = one linear layer; null = objective's, else feature width."""
    deep_head: bool | None = None
    """SimReg's projection head (4 layers, batch norm) instead of 2 layers; null = objective's."""
    init: str | None = None
    """Initial weights (head too if it fits): run folder, student/SEED/timm file; null = random."""
    epochs: int | None = None
    """Passes over the training images, if fewer than the run's epochs; null = all."""
    init_rule: str | None = None
    """Rule of random weights and dropout: released, timm; null = released where SEED has one."""
    pretrained: bool = False
    """network=timm: whether the encoder starts from timm's weights, which timm downloads."""
    args: dict[str, Any] = field(default_factory=dict)
    """network=timm: options of timm.create_model, {drop_path_rate: 0.1}; or of the factory."""

    def __post_init__(self) -> None:
        released = self.network in RELEASED_NETWORKS
        if self.init_rule is None:
            self.init_rule = "released" if released else "timm"
        require(
            self.init_rule in INIT_RULES,
            f"students.<name>.init_rule must be null or one of {', '.join(INIT_RULES)}, "
            f"got {self.init_rule}",
        )
        require(
            released or self.init_rule == "timm",
            f"students.<name>.init_rule=released is a rule of the networks that SEED released "
            f"({', '.join(RELEASED_NETWORKS)}), not of network={self.network}; leave it out",
        )
        require(
            self.network == "timm" or not self.pretrained,
            f"students.<name>.pretrained=true means timm's weights, for network=timm (student=timm/"
            f"NAME); this network is {self.network}: give a file, students.<name>.init=PATH",
        )
        require(
            not (self.pretrained and self.init),
            f"students.<name>.pretrained=true and init={self.init} are two sets of initial "
            "weights; leave one of them out",
        )
        self._check_args()
        require(
            self.hidden_dim is None or self.hidden_dim >= 0,
            f"hidden_dim must be null, 0 or more, got {self.hidden_dim}",
        )
        require(
            self.epochs is None or self.epochs >= 1,
            f"students.<name>.epochs must be null or at least 1, got {self.epochs}",
        )

    def _check_args(self) -> None:
        # Student files have them too, so they may come from anyone.
        require(
            isinstance(self.args, dict),
            f"students.<name>.args must be a mapping, such as {{drop_path_rate: 0.1}}, "
            f"got {self.args}",
        )
        require(
            not self.args or self.network == "timm" or is_place(self.network),
            f"students.<name>.args={self.args} is for network=timm and for student=custom; "
            f"this network is {self.network}",
        )
        for name, value in self.args.items():
            # They may come from the header of a file, and become part of lines of Python.
            require(
                str(name).isidentifier() and not keyword.iskeyword(name),
                f"students.<name>.args has {name!r}, which is no name of an option",
            )
            require(
                self.network != "timm"
                or not (name in RESERVED_ARGS or name.startswith("pretrained")),
                f"students.<name>.args.{name}={value} is not for you to set; "
                "args are options of the architecture, such as drop_path_rate",
            )
            require(
                _is_plain(value),
                f"students.<name>.args.{name} must be a number, text, true, false, null, or a list "
                f"of these, got {value}",
            )


def is_place(network: str) -> bool:
    """Whether this is the place of a custom network, module:function, not a key of a registry."""
    return PLACE.fullmatch(network) is not None


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


@dataclass
class TeacherConfig:
    network: str = MISSING
    """Key of models.teachers.TEACHERS: run, timm = any; or module:function (teacher=custom)."""
    name: str | None = None
    """network=timm: model name in timm, or hf-hub:ORG/MODEL on the Hugging Face hub."""
    checkpoint: str | None = None
    """Checkpoint file (network=run: run folder or student file); null = the official download."""
    student: str | None = None
    """network=run: name of the network, if the run trained several."""
    size: int | None = None
    """Side to which global views are resized for it, others in proportion; null = as it needs."""
    embedding: TeacherEmbedding = TeacherEmbedding.head
    """Output that students learn: head, features (before it); of a ViT cls, mean_patch or both."""
    reduce: Reduce | None = None
    """Fixed map of embeddings, fitted before: pca, whiten (narrower); standardize, phi_s (not)."""
    embedding_dim: int | None = None
    """reduce=pca, whiten: width of the reduced embedding; null = 128."""
    num_reduce_images: int = 10000
    """reduce, dense_weight: training images, evenly spaced, on which they are fitted, at most."""

    def __post_init__(self) -> None:
        require(
            self.name is None or self.network == "timm",
            f"teacher.name={self.name} is only for teacher=timm; this teacher is {self.network}",
        )
        require(
            self.size is None or self.size >= 2,
            f"teacher.size must be null or at least 2 pixels, got {self.size}",
        )
        dim, num = self.embedding_dim, self.num_reduce_images
        require(
            dim is None or self.reduce is not None,
            f"teacher.embedding_dim={dim} needs teacher.reduce=pca or whiten: "
            "without it embeddings are as wide as the teacher's",
        )
        require(
            dim is None or self.reduce in (Reduce.pca, Reduce.whiten),
            f"teacher.embedding_dim={dim} is for teacher.reduce=pca or whiten; "
            f"{self.reduce and self.reduce.value} keeps the teacher's width, so leave it out",
        )
        require(
            dim is None or dim >= 1, f"teacher.embedding_dim must be null or at least 1, got {dim}"
        )
        require(num >= 2, f"teacher.num_reduce_images must be at least 2, got {num}")


@dataclass
class TeacherSSLConfig:
    name: str = MISSING
    """Key of models.teacher_ssl.TEACHER_SSL: convention of the checkpoint's tensor names."""
