"""`python -m seed_exp.zoo`, as it is typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants
from torch import nn

from seed_exp import zoo
from seed_exp.models.teachers import NETWORKS, TEACHERS, TeacherSpec
from seed_exp.tools import zoo_actions

NAMES = ("moco_v1_r9", "moco_v1_r8")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache with the file of one of two published teachers of a few hundred weights."""
    monkeypatch.setenv("SEED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("SEED_MIRROR", raising=False)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setitem(NETWORKS, "tiny", lambda: tiny.Encoder(6, bn=True))
    for name in NAMES:
        monkeypatch.setitem(
            TEACHERS, name, TeacherSpec("tiny", "moco_v1", embedding_dim=5, file_name=f"{name}.pth")
        )
    (tmp_path / "cache").mkdir()
    tensors = {**tiny.Encoder(6, bn=True).state_dict(), **nn.Linear(6, 5).state_dict(prefix="fc.")}
    content = {"state_dict": {f"module.encoder_q.{key}": tensor for key, tensor in tensors.items()}}
    torch.save(content, tmp_path / "cache" / "moco_v1_r9.pth")
    return tmp_path / "cache"


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Runs the command; returns its output and its error."""

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["zoo", *arguments])
        error = ""
        try:
            zoo.main()
        except SystemExit as end:
            error = str(end.code)
        printed = capsys.readouterr()
        return printed.out, printed.err + error

    return run


Typed = Callable[..., tuple[str, str]]


def test_the_list_has_a_line_for_each_with_what_is_known(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, error = typed("list")
    assert error == ""
    lines = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("|")}
    assert [part.strip() for part in lines["moco_v2_r50"].split("|")[2:-1]] == [
        *("resnet50", "MoCo-V2", "200", "67.7", "23.5 M", "MIT", "md5:59fd9945", "absent")
    ]
    assert "CC-BY-NC-4.0, non-commercial" in lines["swav_r50w2"]
    assert "unverified" in lines["moco_v1_r9"]
    assert "SEED from ResNet-152 SwAV" in lines["seed_efficientnet_b1_swav_r152"]
    monkeypatch.setattr(zoo_actions, "num_parameters", lambda _: 1)  # to count takes seconds
    everything = json.loads(typed("list", "--json")[0])
    assert {entry["name"] for entry in everything} == lines.keys() - {
        "name",
        "---",
        "-" * max(map(len, lines)),
    }


def test_the_list_can_be_of_those_with_one_kind_of_licence(
    typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo_actions, "num_parameters", lambda _: 1)  # to count takes seconds
    found = {
        kind: {entry["name"] for entry in json.loads(typed("list", f"licence={kind}", "--json")[0])}
        for kind in ("permissive", "non-commercial", "own-terms", "unknown")
    }
    assert sum(map(len, found.values())) == len(json.loads(typed("list", "--json")[0]))
    assert {"moco_v2_r50", "dino_r50", "dinov2_s", "siglip2_so400m"} <= found["permissive"]
    assert {"swav_r50", "eupe_s", "mobileclip2_s0"} <= found["non-commercial"]
    assert {"dinov3_s", "dinov3_convnext_l"} <= found["own-terms"]
    assert "simclr_r50" in found["unknown"]
    both = json.loads(typed("list", "licence=permissive", "licence=own-terms", "--json")[0])
    assert {entry["name"] for entry in both} == found["permissive"] | found["own-terms"]
    _, error = typed("list", "licence=free")
    assert "zoo list takes licence=permissive|non-commercial|own-terms|unknown" in error


def test_weights_of_timm_are_shown_with_licence_gate_and_size(typed: Typed) -> None:
    out, _ = typed("show", "dinov3_s")
    for words in (
        "vit_small_patch16_dinov3.lvd1689m",
        "DINOv3-License",
        "Meta gives its own files on request only",
        "21,586,944",
        "86,347,776",
        "https://huggingface.co/timm/vit_small_patch16_dinov3.lvd1689m",
        "own-terms",
    ):
        assert words in out


def test_one_is_shown_with_its_use_and_its_sources(typed: Typed) -> None:
    out, _ = typed("show", "swav_r50w2")
    for words in (
        "https://dl.fbaipublicfiles.com/deepcluster/swav_RN50w2_400ep_pretrain.pth.tar",
        "python -m seed_exp.distill teacher=swav_r50w2",
        "forbids commercial use",
        "github.com/facebookresearch/swav",
        "93,907,072",
    ):
        assert words in out
    shown = json.loads(typed("show", "vicreg_r50", "--json")[0])
    assert (shown["size"], shown["forbids_commercial_use"], shown["cache"]) == (
        94_345_885,
        False,
        "absent",
    )
    assert "harvard-visionlab" in shown["hash_source"]
    student = json.loads(typed("show", "seed_resnet18_moco_v2_r50", "--json")[0])
    assert f"students.resnet18.init={student['path']}" in student["use"]
    assert "links that expire" in student["note"]


def test_what_is_here_is_verified_and_then_known_as_such(typed: Typed, cache: Path) -> None:
    out, error = typed("verify", "--all")
    assert error == ""
    assert "moco_v1_r9: path " in out
    assert "none is published, embeddings finite, 5 wide" in out
    assert json.loads(typed("show", "moco_v1_r9", "--json")[0])["cache"] == "noted"
    assert json.loads(typed("fetch", "moco_v1_r9", "--json")[0])["moco_v1_r9"]["path"] == str(
        cache / "moco_v1_r9.pth"
    )
    found = json.loads(
        typed("verify", "moco_v1_r8", "--file", str(cache / "moco_v1_r9.pth"), "--json")[0]
    )
    assert found["moco_v1_r8"]["path"].endswith("moco_v1_r9.pth")


def test_one_that_fails_keeps_none_of_the_others_from_being_done(typed: Typed, cache: Path) -> None:
    (cache / "moco_v1_r8.pth").write_bytes(b"<html>sign in</html>")
    out, error = typed("verify", "moco_v1_r8", "moco_v1_r9")
    assert "moco_v1_r9: path" in out
    assert "moco_v1_r8.pth cannot be read: broken, incomplete or no checkpoint" in error
    assert error.endswith("\n1")
    assert len(error.splitlines()) == 2
    for file in cache.iterdir():
        file.unlink()
    assert typed("verify", "--all", "--json") == ("{}\n", f"nothing in the cache {cache}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "swav_r51"], "unknown entry of the zoo 'swav_r51'; did you mean 'swav_r50'"),
        (["fetch", "../../etc/passwd"], "unknown entry of the zoo '../../etc/passwd'"),
        (
            ["fetch", "simclr_r50"],
            "simclr_r50 has no lasting address to download from; put its file at",
        ),
        (["verify", "swav_r50"], "swav_r50 is not in the cache: no file"),
        (["verify"], "give names or --all"),
        (["verify", "--all", "swav_r50"], "give names or --all"),
        (
            ["verify", "swav_r50", "dino_r50", "--file", "x"],
            "--file is one file: give it with one name, got 2 names",
        ),
        (["verify", "swav_r50", "--file", "/none"], "no file /none"),
        (["fetch"], "the following arguments are required: NAME"),
        (["remove"], "invalid choice: 'remove'"),
        ([], "the following arguments are required"),
    ],
)
def test_errors_are_one_line(typed: Typed, arguments: list[str], message: str) -> None:
    out, error = typed(*arguments)
    assert out == ""
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_no_secret_of_an_address_is_printed(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = "https://user:hunter22@h/x.pth?X-Amz-Signature=abcdef12"
    monkeypatch.setitem(
        TEACHERS, "moco_v1_r8", TeacherSpec("tiny", "moco_v1", url=signed, file_name="x.pth")
    )
    monkeypatch.setattr(zoo_actions, "num_parameters", lambda _: 1)  # to count takes seconds
    for arguments in (["show", "moco_v1_r8"], ["show", "moco_v1_r8", "--json"], ["list", "--json"]):
        out, error = typed(*arguments)
        assert error == ""
        assert "hunter22" not in out
        assert "abcdef12" not in out
