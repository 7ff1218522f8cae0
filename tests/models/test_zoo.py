"""The zoo says what is known of published files and no more, and finds out what a file here is."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import timm
import tiny
import torch
from huggingface_hub import constants
from safetensors.torch import save
from test_download import Server, server  # noqa: F401
from torch import Tensor, nn

from seed_exp.config.schema import TeacherConfig
from seed_exp.models import hub_weights as module_hub
from seed_exp.models import zoo as module
from seed_exp.models.students import STUDENTS
from seed_exp.models.teachers import (
    NETWORKS,
    TEACHERS,
    TeacherSpec,
    build_teacher,
    untrained_teacher,
)
from seed_exp.models.timm_teachers import FAMILIES, TIMM_TEACHERS, TimmTeacher
from seed_exp.models.zoo import cache_state, fetch, num_parameters, verify
from seed_exp.models.zoo_entries import zoo

NAME = "moco_v1_r9"
CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a published teacher of a few hundred weights."""
    monkeypatch.setenv("SEED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("SEED_MIRROR", raising=False)
    monkeypatch.setitem(NETWORKS, "tiny", lambda: tiny.Encoder(6, bn=True))
    monkeypatch.setitem(
        TEACHERS, NAME, TeacherSpec("tiny", "moco_v1", 3, embedding_dim=5, file_name="tiny.pth")
    )
    return tmp_path / "cache"


def weights(**changes: Tensor) -> dict[str, dict[str, Tensor]]:
    """A file of the tiny teacher, by its convention."""
    torch.manual_seed(0)
    named = {
        **tiny.Encoder(6, bn=True).state_dict(),
        **nn.Linear(6, 5).state_dict(prefix="fc."),
        **changes,
    }
    return {"state_dict": {f"module.encoder_q.{key}": tensor for key, tensor in named.items()}}


def put(path: Path, **changes: Tensor) -> str:
    """Writes the file; returns its SHA-256."""
    path.parent.mkdir(exist_ok=True)
    torch.save(weights(**changes), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def publish(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    monkeypatch.setitem(TEACHERS, NAME, replace(TEACHERS[NAME], **changes))


# Known files.


def test_every_published_teacher_and_the_eight_students_are_there() -> None:
    entries = zoo()
    teachers = [name for name, entry in entries.items() if entry.kind == "teacher"]
    assert set(teachers) == set(TEACHERS) - {"resnet50", "timm", "run"}
    students = [entry for entry in entries.values() if entry.kind == "student"]
    assert [
        (entry.network, entry.method.removeprefix("SEED from "), entry.epochs) for entry in students
    ] == [
        ("resnet18", "ResNet-50 MoCo-V2", 200),
        ("resnet18", "ResNet-50W2 SwAV with local views", 400),
        ("mobilenetv3_large", "ResNet-50 MoCo-V2", 200),
        ("efficientnet_b0", "ResNet-50W4 SwAV with local views", 400),
        ("efficientnet_b0", "ResNet-50W2 SwAV with local views", 800),
        ("efficientnet_b1", "ResNet-50 SwAV with local views", 200),
        ("efficientnet_b1", "ResNet-152 SwAV", 200),
        ("resnet50", "ResNet-50W4 SwAV with local views", 400),
    ]
    assert len({entry.path for entry in entries.values()}) == len(entries)


def test_what_is_said_has_a_source_and_what_is_unknown_is_not_said() -> None:
    for name, entry in zoo().items():
        if entry.hub is not None:
            continue
        assert entry.network in (NETWORKS if entry.kind == "teacher" else STUDENTS)
        assert (entry.top1 is None) == (entry.top1_source is None), name
        assert (entry.hash is None) == (entry.hash_source is None), name
        assert entry.hash is None or entry.hash.partition(":")[0] in ("md5", "sha256")
        assert entry.url is None or entry.url.startswith("https://dl.fbaipublicfiles.com/")
        assert "expire" in entry.note or entry.url or name == NAME
        assert entry.path.parent == Path(os.environ["SEED_CACHE"])
    assert zoo()["moco_v2_r152"].top1_source == "SEED (arXiv:2101.04731)"
    assert zoo()["swav_r50w4"].forbids_commercial_use is True
    assert zoo()["moco_v2_r50"].forbids_commercial_use is False
    assert zoo()["simclr_r50"].forbids_commercial_use is None
    assert (
        "SwAV's weights, which taught it, are CC-BY-NC-4.0"
        in zoo()["seed_resnet18_swav_r50w2"].note
    )
    assert "CC-BY-NC" not in zoo()["seed_resnet18_moco_v2_r50"].note


def test_facts_about_weights_of_timm_are_timms() -> None:
    for name, facts in TIMM_TEACHERS.items():
        entry, config = zoo()[name], timm.models.get_pretrained_cfg(facts.name)
        assert config is not None, name
        assert (entry.hub, entry.licence.lower()) == (config.hf_hub_id, config.license)
        assert entry.url == f"https://huggingface.co/{entry.hub}"
        assert bool(entry.note) == (entry.kind_of_licence != "permissive")
    assert zoo()["dinov2_s"].kind_of_licence == "permissive"
    assert "on request only" in str(zoo()["dinov3_b"].gate)
    assert zoo()["eupe_b"].forbids_commercial_use is True
    assert zoo()["siglip2_b"].gate is None


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM_TEACHERS)
def test_teachers_of_timm_take_all_views_and_have_the_stated_size(name: str) -> None:
    config = TeacherConfig(name)
    with torch.device("meta"):
        teacher = untrained_teacher(config, "").to("meta")
        for size in (224, 96):
            assert teacher.embed(torch.zeros(1, 3, size, size)).shape == (1, teacher.embedding_dim)
    assert sum(parameter.numel() for parameter in teacher.parameters()) == num_parameters(
        zoo()[name]
    )
    text = (CONF / "teacher" / f"{name}.yaml").read_text()
    assert f"embedding of {teacher.embedding_dim} numbers" in text


def test_option_files_of_timms_teachers_say_what_the_tables_say() -> None:
    for name, facts in TIMM_TEACHERS.items():
        family = FAMILIES[facts.family]
        text = (CONF / "teacher" / f"{name}.yaml").read_text()
        assert f"({family.paper}), timm's {facts.name}.\n" in text
        assert f"# {facts.parameters / 1e6:,.1f} M parameters, " in text
        assert re.search(rf"of the weights: {family.licence.replace('-License', '.License')}", text)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one teacher's file, named and linked as the hub's client does."""
    monkeypatch.setitem(TIMM_TEACHERS, "dinov2_s", TimmTeacher("test_vit", "dinov2", parameters=1))
    torch.manual_seed(0)
    content = save(timm.create_model("test_vit", num_classes=0).state_dict())
    folder = tmp_path / "hub" / "models--timm--test_vit"
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    for each in ("blobs", "refs", "snapshots/abc"):
        (folder / each).mkdir(parents=True)
    blob.write_bytes(content)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / "model.safetensors").symlink_to(blob)
    return blob


def test_weights_in_the_hubs_cache_are_found_and_compared_with_the_hubs_hash(hub: Path) -> None:
    entry = zoo()["dinov2_s"]
    assert cache_state(entry) == "in the hub's cache"
    assert cache_state(zoo()["dinov2_b"]) == "absent"
    assert fetch(entry).resolve() == hub  # without a connection
    found = verify(entry)
    assert found.published == f"sha256:{hub.name}"
    assert (found.sha256, found.embedding_dim) == (hub.name, 64)
    hub.write_bytes(hub.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="not the published file"):
        verify(entry)


def test_a_download_from_the_hub_that_fails_is_one_line_with_what_a_gate_needs(
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object, **__: object) -> str:
        raise OSError("401 Client Error\nmuch more")

    monkeypatch.setattr(module_hub, "hf_hub_download", refused)
    with pytest.raises(
        ValueError,
        match=r"of timm/vit_base\w+\.lvd142m .*\(401 Client Error\).*"
        r"accept its terms at https://huggingface\.co/timm/vit_base",
    ):
        fetch(zoo()["dinov2_b"])


def test_sizes_of_networks_are_those_of_the_papers() -> None:
    millions = {
        entry.network: round(num_parameters(entry) / 1e6)
        for entry in zoo().values()
        if entry.kind == "teacher"
    }
    assert {
        key: millions[key] for key in ("resnet50", "resnet50w2", "resnet50w4", "resnet50w5")
    } == {
        "resnet50": 24,
        "resnet50w2": 94,
        "resnet50w4": 375,
        "resnet50w5": 586,
    }


# Files here.


def test_the_state_of_a_file_is_told_without_reading_it(
    cache: Path,
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    publish(monkeypatch, url=server.url.partition("?")[0])
    assert cache_state(zoo()[NAME]) == "absent"
    server.ranges, server.break_after, server.num_breaks = False, 64_000, 99
    with pytest.raises(ValueError, match="closed after 64000 of 256000 bytes"):
        fetch(zoo()[NAME])
    assert cache_state(zoo()[NAME]) == "partial 25 %"
    sha256 = put(cache / "tiny.pth")
    assert cache_state(zoo()[NAME]) == "unverified"
    verify(zoo()[NAME])
    assert cache_state(zoo()[NAME]) == "noted"
    publish(monkeypatch, hash="sha256:00000000")
    assert cache_state(zoo()[NAME]) == "unverified"
    publish(monkeypatch, hash=f"sha256:{sha256[:9]}")
    assert cache_state(zoo()[NAME]) == "verified"
    os.utime(cache / "tiny.pth.sha256", ns=(0, 0))  # as if the file had been written later
    assert cache_state(zoo()[NAME]) == "unverified"


def test_what_is_fetched_is_a_teacher_at_once(
    cache: Path,
    tmp_path: Path,
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sha256 = put(tmp_path / "there.pth")
    server.content = (tmp_path / "there.pth").read_bytes()
    publish(monkeypatch, url=server.url.partition("?")[0], hash=f"sha256:{sha256}")
    assert fetch(zoo()[NAME]) == cache / "tiny.pth"
    assert cache_state(zoo()[NAME]) == "verified"
    assert build_teacher(TeacherConfig(NAME), "moco_v1").fingerprint == sha256
    assert len(server.requests) == 1


def test_a_file_without_address_comes_from_a_mirror_or_from_the_user(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError,
        match=r"moco_v1_r9 has no lasting address.*put its file at \S+\. SEED's authors give it",
    ):
        fetch(zoo()[NAME])
    with pytest.raises(
        ValueError, match=r"no lasting address.*teacher\.checkpoint=PATH or put it at \S+tiny\.pth"
    ):
        build_teacher(TeacherConfig(NAME), "moco_v1")
    put(tmp_path / "disk" / "tiny.pth")
    monkeypatch.setenv("SEED_MIRROR", f"file://{tmp_path}/disk")
    assert build_teacher(TeacherConfig(NAME), "moco_v1").embedding_dim == 5
    monkeypatch.delenv("SEED_MIRROR")
    assert fetch(zoo()[NAME]) == cache / "tiny.pth"


def test_a_file_that_was_put_there_is_hashed_when_it_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache / "tiny.pth")
    publish(monkeypatch, hash="md5:00000000", url="http://127.0.0.1:9/x")
    with pytest.raises(
        ValueError,
        match=r"tiny\.pth is not moco_v1_r9: md5 \w+, expected 0000.*; "
        r"delete it and fetch it again",
    ):
        fetch(zoo()[NAME])


# Contents of a file.


def test_a_good_file_is_verified_and_its_hash_noted_where_none_is_published(
    cache: Path, tmp_path: Path
) -> None:
    sha256 = put(cache / "tiny.pth")
    found = verify(zoo()[NAME])
    assert (found.path, found.sha256, found.published, found.embedding_dim) == (
        cache / "tiny.pth",
        sha256,
        None,
        5,
    )
    assert (cache / "tiny.pth.sha256").read_text() == f"{sha256}  tiny.pth\n"
    put(tmp_path / "mine.pth")
    assert verify(zoo()[NAME], tmp_path / "mine.pth").path == tmp_path / "mine.pth"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mine.pth"]


def test_a_file_that_changed_after_its_first_use_is_noticed_by_all(cache: Path) -> None:
    put(cache / "tiny.pth")
    verify(zoo()[NAME])
    put(cache / "tiny.pth", **{"fc.bias": torch.ones(5)})
    os.utime(cache / "tiny.pth.sha256", ns=(0, 0))
    for use in (
        lambda: verify(zoo()[NAME]),
        lambda: fetch(zoo()[NAME]),
        lambda: build_teacher(TeacherConfig(NAME), "moco_v1"),
    ):
        with pytest.raises(
            ValueError,
            match=r"has changed since it was first used.*delete tiny\.pth\.sha256 beside it",
        ):
            use()
    (cache / "tiny.pth.sha256").unlink()
    verify(zoo()[NAME])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fc.bias": torch.full((5,), torch.nan)},
            "embeddings that are not finite: broken weights",
        ),
        (
            {"fc.weight": torch.ones(4, 6), "fc.bias": torch.ones(4)},
            r"embeddings \[2, 4\] of two images, expected \[2, 5\]",
        ),
        (
            {"layers.0.weight": torch.ones(1)},
            r"does not fit teacher_ssl=moco_v1: .*layers\.0\.weight is \[1\]",
        ),
    ],
)
def test_a_file_that_does_not_work_is_refused(
    cache: Path, changes: dict[str, Tensor], message: str
) -> None:
    put(cache / "tiny.pth", **changes)
    with pytest.raises(ValueError, match=message):
        verify(zoo()[NAME])


def test_a_file_that_is_broken_or_absent_is_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"moco_v1_r9 is not in the cache: no file \S+tiny\.pth"
    ):
        verify(zoo()[NAME])
    with pytest.raises(FileNotFoundError, match=r"^no file \S+mine\.pth"):
        verify(zoo()[NAME], tmp_path / "mine.pth")
    put(tmp_path / "mine.pth")
    (tmp_path / "mine.pth").write_bytes((tmp_path / "mine.pth").read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"mine\.pth cannot be read: broken, incomplete or no checkpoint"
    ):
        verify(zoo()[NAME], tmp_path / "mine.pth")


def test_a_released_student_is_recognised(cache: Path, shared: Path, fill: ModuleType) -> None:
    cache.mkdir()
    file = cache / "seed_resnet18_moco_v2_r50.pth.tar"
    torch.save(fill.checkpoint(shared / "fixtures" / "seed_student_resnet18.json"), file)
    assert verify(zoo()["seed_resnet18_moco_v2_r50"]).embedding_dim == 128
    with pytest.raises(
        ValueError, match="holds a student resnet18; seed_resnet50_swav_r50w4 is a resnet50"
    ):
        verify(zoo()["seed_resnet50_swav_r50w4"], file)


def test_the_names_of_the_released_files_are_shown_and_tell_the_local_views() -> None:
    """The names are those in the README of the authors."""
    files = {
        "seed_resnet18_moco_v2_r50": "resnet18_distill_resnet50-moco-v2-checkpoint_0199",
        "seed_resnet18_swav_r50w2": (
            "AMP_SMALL_PATCH_400_resnet18_distill_resnet50w2-swav-checkpoint_0399"
        ),
        "seed_mobilenetv3_large_moco_v2_r50": "mobilenetv3_large_distill-moco-v2-checkpoint_0199",
        "seed_efficientnet_b0_swav_r50w4": (
            "AMP_SMALL_PATCH_400_efficientnet_b0_distill_resnet50w4-swav-checkpoint_0399"
        ),
        "seed_efficientnet_b0_swav_r50w2": (
            "AMP_SMALL_PATCH_800_efficientnet_b0_distill_resnet50w2-swav-checkpoint_0799"
        ),
        "seed_efficientnet_b1_swav_r152": (
            "AMP_200_efficientnet_b1_distill_resnet152-swav-checkpoint_0199"
        ),
        "seed_resnet50_swav_r50w4": (
            "AMP_SMALL_PATCH_400_resnet50_distill_resnet50w4-swav-checkpoint_0399"
        ),
    }
    for name, file in files.items():
        assert f" {file}.pth.tar" in zoo()[name].note
        assert zoo()[name].method.endswith("with local views") == ("SMALL_PATCH" in file)
        assert zoo()[name].doubt == ""
    students = {name for name, entry in zoo().items() if entry.kind == "student"}
    assert students - files.keys() == {"seed_efficientnet_b1_swav_r50"}


def test_the_student_whose_link_leads_to_another_is_never_verified_without_a_doubt(
    tmp_path: Path, shared: Path, fill: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = zoo()["seed_efficientnet_b1_swav_r50"]
    linked = "resnet18_distill_resnet50-moco-v2-checkpoint_0199"
    assert linked in entry.doubt
    with pytest.raises(ValueError, match=rf"no lasting address.*leads to {linked}"):
        fetch(entry)
    torch.save(fill.checkpoint(shared / "fixtures" / "seed_student_resnet18.json"), tmp_path / "f")
    message = rf"holds a student resnet18; {entry.name} is a efficientnet_b1\. .*{linked}"
    with pytest.raises(ValueError, match=message):
        verify(entry, tmp_path / "f")
    any_network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr(module, "_load", lambda *_: (any_network, 3))  # in place of a B1
    assert verify(entry, tmp_path / "f").doubt == entry.doubt


def test_a_cache_that_only_others_may_write_into_can_be_verified(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache / "tiny.pth")
    monkeypatch.setattr(
        module.os, "access", lambda *_: False
    )  # as root, permissions would refuse nothing
    verify(zoo()[NAME])
    assert not (cache / "tiny.pth.sha256").exists()
