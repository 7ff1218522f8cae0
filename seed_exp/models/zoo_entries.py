"""Published weights: the facts about each file, with their sources."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from seed_exp.models.download import cached
from seed_exp.models.hub_weights import WEIGHTS, hub_path
from seed_exp.models.teachers import TEACHERS, TeacherSpec
from seed_exp.models.timm_teachers import FAMILIES, TIMM_TEACHERS, TimmTeacher, hub_repository

SEED = "SEED (arXiv:2101.04731)"
NON_COMMERCIAL = {"CC-BY-NC-4.0", "FAIR-Noncommercial-Research-License", "Apple-AMLR"}
"""Licences that forbid commercial use."""
PERMISSIVE = {"MIT", "Apache-2.0"}
"""Licences that allow nearly everything."""
LICENCES = ("permissive", "non-commercial", "own-terms", "unknown")
"""Kinds of licences: what is none of the first two and known is somebody's own terms."""


@dataclass(frozen=True)
class ZooEntry:
    """Facts about one published file; None = unknown."""

    name: str
    """Name in the zoo."""
    kind: str
    """`teacher` or `student`."""
    network: str
    """Key of NETWORKS or STUDENTS, or a name in timm."""
    method: str
    """Method of its training without labels."""
    paper: str
    """Paper that describes the method."""
    epochs: int | None
    """Epochs of its training without labels on ImageNet-1k."""
    top1: float | None
    """Published top-1 accuracy in linear evaluation on ImageNet-1k, percent."""
    top1_source: str | None
    """Who published the accuracy."""
    licence: str | None
    """Licence of the weights."""
    hash: str | None
    """Hash of the file: algorithm and beginning of the hexadecimal digest."""
    hash_source: str | None
    """Who published the hash."""
    url: str | None
    """Address of the file; None = it has no lasting address."""
    size: int | None
    """Size of the file in bytes."""
    file_name: str
    """Name of the file in the cache."""
    use: str
    """Command and options that use the weights."""
    note: str
    """Further remarks for the user; may be empty."""
    doubt: str
    """Why no file can be known to be this entry's; empty where there is no doubt."""
    hub: str | None = None
    """Repository on the Hugging Face hub, from which it comes; None = from `url`."""
    gate: str | None = None
    """Who has to agree before a download."""

    @property
    def path(self) -> Path:
        """Path of the file in the cache, ours or the hub's, whether it exists or not."""
        return cached(self.file_name) if self.hub is None else hub_path(self.hub)

    @property
    def forbids_commercial_use(self) -> bool | None:
        """Whether the licence forbids commercial use; None = the licence is unknown."""
        return None if self.licence is None else self.licence in NON_COMMERCIAL

    @property
    def kind_of_licence(self) -> str:
        """One of LICENCES."""
        if self.licence is None:
            return "unknown"
        if self.licence in PERMISSIVE:
            return "permissive"
        return "non-commercial" if self.licence in NON_COMMERCIAL else "own-terms"


@dataclass(frozen=True)
class _Publication:
    method: str
    paper: str
    source: str


@dataclass(frozen=True)
class _Released:
    network: str
    teacher: str
    epochs: int
    file: str | None
    """Name of the released file, without its ending; None = the link leads to another student's."""
    top1: float | None = None
    top1_source: str | None = SEED

    @property
    def local_views(self) -> bool:
        """Whether it was trained with local views, which SEED calls small patches."""
        return self.file is None or "SMALL_PATCH" in self.file


_PUBLICATIONS = {
    "moco_v1": _Publication("MoCo-V1", "arXiv:1911.05722", "github.com/facebookresearch/moco"),
    "moco_v2": _Publication("MoCo-V2", "arXiv:2003.04297", "github.com/facebookresearch/moco"),
    "moco_v3": _Publication("MoCo-V3", "arXiv:2104.02057", "github.com/facebookresearch/moco-v3"),
    "simclr": _Publication("SimCLR", "arXiv:2002.05709", "github.com/google-research/simclr"),
    "swav": _Publication("SwAV", "arXiv:2006.09882", "github.com/facebookresearch/swav"),
    "dino": _Publication("DINO", "arXiv:2104.14294", "github.com/facebookresearch/dino"),
    "vicreg": _Publication("VICReg", "arXiv:2105.04906", "github.com/facebookresearch/vicreg"),
    "barlow_twins": _Publication(
        "Barlow Twins", "arXiv:2103.03230", "github.com/facebookresearch/barlowtwins"
    ),
}
"""Beginning of a teacher's name, before its network -> its publication."""

# The rows of the table in SEED's README. An accuracy is given if the paper has a number for the
# same network, teacher and epochs.
_RESNET18_FILE = "resnet18_distill_resnet50-moco-v2-checkpoint_0199"
_RELEASED = {
    "seed_resnet18_moco_v2_r50": _Released(
        "resnet18", "ResNet-50 MoCo-V2", 200, _RESNET18_FILE, 57.6
    ),
    "seed_resnet18_swav_r50w2": _Released(
        "resnet18",
        "ResNet-50W2 SwAV",
        400,
        "AMP_SMALL_PATCH_400_resnet18_distill_resnet50w2-swav-checkpoint_0399",
    ),
    "seed_mobilenetv3_large_moco_v2_r50": _Released(
        "mobilenetv3_large",
        "ResNet-50 MoCo-V2",
        200,
        "mobilenetv3_large_distill-moco-v2-checkpoint_0199",
        55.2,
    ),
    "seed_efficientnet_b0_swav_r50w4": _Released(
        "efficientnet_b0",
        "ResNet-50W4 SwAV",
        400,
        "AMP_SMALL_PATCH_400_efficientnet_b0_distill_resnet50w4-swav-checkpoint_0399",
    ),
    "seed_efficientnet_b0_swav_r50w2": _Released(
        "efficientnet_b0",
        "ResNet-50W2 SwAV",
        800,
        "AMP_SMALL_PATCH_800_efficientnet_b0_distill_resnet50w2-swav-checkpoint_0799",
        67.6,
    ),
    # The README's only command for this pair is the one with local views.
    "seed_efficientnet_b1_swav_r50": _Released("efficientnet_b1", "ResNet-50 SwAV", 200, None),
    "seed_efficientnet_b1_swav_r152": _Released(
        "efficientnet_b1",
        "ResNet-152 SwAV",
        200,
        "AMP_200_efficientnet_b1_distill_resnet152-swav-checkpoint_0199",
    ),
    "seed_resnet50_swav_r50w4": _Released(
        "resnet50",
        "ResNet-50W4 SwAV",
        400,
        "AMP_SMALL_PATCH_400_resnet50_distill_resnet50w4-swav-checkpoint_0399",
        74.3,
        f"{SEED}, without its epochs",
    ),
}

_EXPIRES = "SEED's authors give it out behind links that expire: take a fresh one from their README"
_WRONG_LINK = (
    f"The link for it in SEED's README leads to {_RESNET18_FILE}.pth.tar, another student: "
    "no file is known to be this one, so none can be verified as it"
)
_NON_COMMERCIAL_NOTE = (
    "Its licence forbids commercial use, which may bind what is distilled from it too"
)


def zoo() -> dict[str, ZooEntry]:
    """All entries by name: the published teachers of TEACHERS, then the students of SEED."""
    teachers = {
        name: _teacher(name, spec)
        for name, spec in TEACHERS.items()
        if _published(name) in _PUBLICATIONS
    } | {name: _of_timm(name, facts) for name, facts in TIMM_TEACHERS.items()}
    return teachers | {name: _student(name, released) for name, released in _RELEASED.items()}


def _published(name: str) -> str:
    """Key of _PUBLICATIONS for a teacher: `moco_v2` for `moco_v2_r50_800ep`."""
    return name.partition("_r")[0]


def _teacher(name: str, spec: TeacherSpec) -> ZooEntry:
    publication = _PUBLICATIONS[_published(name)]
    assert spec.network is not None
    assert spec.cache_name is not None
    source = SEED if spec.url is None else publication.source
    return ZooEntry(
        name,
        "teacher",
        spec.network,
        publication.method,
        publication.paper,
        spec.epochs,
        spec.top1,
        source if spec.top1 else None,
        spec.licence,
        spec.hash,
        (spec.hash_source or publication.source) if spec.hash else None,
        spec.url,
        spec.size,
        spec.cache_name,
        f"distill teacher={name}",
        _NON_COMMERCIAL_NOTE if spec.licence in NON_COMMERCIAL else "" if spec.url else _EXPIRES,
        "",
        gate="none" if spec.url else None,
    )


def _of_timm(name: str, facts: TimmTeacher) -> ZooEntry:
    family, repository = FAMILIES[facts.family], hub_repository(facts)
    notes = {
        "permissive": "",
        "non-commercial": _NON_COMMERCIAL_NOTE,
        "own-terms": "Its licence is its publisher's own and may bind what is distilled from it "
        "too: read it",
    }
    entry = ZooEntry(
        name,
        "teacher",
        facts.name,
        family.method,
        family.paper,
        None,
        facts.top1,
        "README of github.com/facebookresearch/dinov2" if facts.top1 else None,
        family.licence,
        None,
        None,
        f"https://huggingface.co/{repository}",
        None,
        WEIGHTS,
        f"distill teacher={name}",
        "",
        "",
        repository,
        family.gate,
    )
    return replace(entry, note=notes[entry.kind_of_licence])


def _student(name: str, released: _Released) -> ZooEntry:
    file_name = f"{name}.pth.tar"
    bound = (
        f"; SwAV's weights, which taught it, are {TEACHERS['swav_r50'].licence}"
        if "SwAV" in released.teacher
        else ""
    )
    views = " with local views" if released.local_views else ""
    named = "" if released.file is None else f". Its file there is {released.file}.pth.tar"
    return ZooEntry(
        name,
        "student",
        released.network,
        f"SEED from {released.teacher}{views}",
        "arXiv:2101.04731",
        released.epochs,
        released.top1,
        released.top1_source if released.top1 else None,
        None,
        None,
        None,
        None,
        None,
        file_name,
        f"distill student={released.network} students.{released.network}.init={cached(file_name)}",
        f"{_EXPIRES}{named}. SEED's code is MIT, of its weights nothing is said{bound}",
        _WRONG_LINK if released.file is None else "",
    )
