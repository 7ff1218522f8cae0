"""The card says what is known, and that the rest is unknown.

Neither secrets nor markup get through it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from seed_exp.config.schema import StudentConfig
from seed_exp.evaluation.results import write_results
from seed_exp.exporting.card import WeightsOrigin, licence_of, model_card
from seed_exp.exporting.formats import FORMATS, Subject, formats_of
from seed_exp.models.students import build_student
from seed_exp.models.teachers import TEACHERS

VIEWS = {
    "eval_size": 224,
    "eval_resize": 256,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
OPTIONS = {
    **{
        "teacher.network": "swav_r50",
        "teacher.name": None,
        "teacher.checkpoint": None,
        "teacher_ssl.name": "swav",
    },
    **{
        "objective.name": "seed",
        "objective.tau_teacher": 0.01,
        "views.name": "mocov2",
        "epochs": 200,
        "optimizer.lr": 0.03,
    },
}
SHA = "ab" * 32


def header(**changes: Any) -> dict[str, Any]:
    inputs = {"data": "tsv:train.tsv:1281167:0123", "teacher": "cd" * 32}
    facts = {"command": "distill", "step": 1000, "options": OPTIONS, "inputs": inputs}
    return {
        "student": {
            "network": "resnet18",
            "name": None,
            "hidden_dim": None,
            "init": None,
            "epochs": None,
        },
        **facts,
        **changes,
    }


def card(tmp_path: Path, network: str = "resnet18", *, name: str = "small", **changes: Any) -> str:
    config = StudentConfig(network)
    images = torch.zeros(3, 3, 8, 8)
    student = build_student(config, 8).eval()
    subject = Subject(name, student, config, VIEWS, images, False, lambda: images)
    formats = formats_of(subject, None)
    origin = WeightsOrigin(header(**changes), SHA, tmp_path / "results")
    return model_card(subject, origin, formats, dict.fromkeys(formats, 2.5e-6), "digits:x", {}, "")


def front(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return {
        key: json.loads(value)
        for key, _, value in (line.partition(": ") for line in matter.splitlines())
    }


def test_it_names_method_teacher_data_input_licence_and_how_to_load(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert front(text) == {
        "license": "cc-by-nc-4.0",
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": [
            "image-feature-extraction",
            "self-supervised-learning",
            "timm",
            "knowledge-distillation",
            "seed",
        ],
    }
    for fact in (
        "timm's `resnet18`: 11,176,512 parameters, features of width 512",
        "- Steps trained: `1000`",
        "- Images: `tsv:train.tsv:1281167:0123`",
        "- tau_teacher: `0.01`",
        "- Name: `swav_r50`",
        "- Epochs of its training: `800`",
        f"- Fingerprint of its weights: `{'cd' * 32}`",
        "shorter side resized to 256 px (bilinear, antialiased), centre of 224 x 224 px",
        "mean [0.485, 0.456, 0.406]",
        'model = timm.create_model("resnet18", num_classes=0, '
        'checkpoint_path="model.safetensors").eval()',
        "model = torchvision.models.resnet18()",
        "2.5e-06",
        "@article{fang2020seed,",
        "None is known for these weights.",
    ):
        assert fact in text, fact


def test_an_average_is_said_to_be_one_and_mixup_is_named(tmp_path: Path) -> None:
    options = {**OPTIONS, "views.mixup": True, "students.small.epochs": 50}
    average = card(tmp_path, name="small_ema", ema_decay=0.999, options=options)
    assert "- Weights: `moving average over the steps, of which each keeps 0.999`" in average
    assert "- Mixup: `each view with one of another image`" in average
    assert "- Epochs of this network: `50`" in average
    phases = {**OPTIONS, "views.resolution": [[0, 56], [9, 84, 112]], "steps": 20}
    sized = "- Sides of global views in pixels: `from step 0 on 56, from step 9 on 84 and 112`"
    assert sized in card(tmp_path, options=phases)
    plain = card(tmp_path)
    assert "average" not in plain
    assert "Mixup" not in plain
    assert "Sides" not in plain


def test_a_network_that_timm_has_only_nearly_is_not_offered_as_timms(tmp_path: Path) -> None:
    text = card(tmp_path, "mobilenetv3_large")
    assert "library_name" not in front(text)
    assert "checkpoint_path" not in text
    assert "local-dir" not in text
    assert "from load import load" in text


def test_results_of_these_weights_come_with_their_protocol_and_others_do_not(
    tmp_path: Path,
) -> None:
    for number, (sha, value) in enumerate({SHA: 67.5, "ef" * 32: 99.25}.items()):
        protocol = {
            "ks": [10 + number],
            "students": {"small": {"sha256": sha}, "other": {"sha256": SHA}},
        }
        write_results(
            tmp_path,
            "knn",
            protocol,
            {"small": {"knn10_majority": value}, "other": {"knn10_majority": 12.25}},
        )
    text = card(tmp_path)
    assert "### knn: k-NN top-1" in text
    assert "67.50" in text
    assert '"ks": [\n      10\n' in text
    assert "99.25" not in text
    assert "12.25" not in text


@pytest.mark.parametrize(
    ("options", "identifier", "words"),
    [
        ({"teacher.network": "moco_v2_r50"}, "mit", "MIT, inherited from the teacher"),
        (
            {"teacher.network": "swav_r50", "teacher.checkpoint": "x.pth"},
            "unknown",
            "its official file has CC-BY-NC-4.0",
        ),
        (
            {"teacher.network": "run", "teacher.checkpoint": "runs/x"},
            "unknown",
            "came without a licence",
        ),
        ({"teacher.network": "simclr_r50"}, "unknown", "came without a licence"),
        (
            {"teacher.network": "timm", "teacher.name": "vit_base_patch14_reg4_dinov2.lvd142m"},
            "apache-2.0",
            "inherited",
        ),
        (
            {"teacher.network": "timm", "teacher.name": "hf-hub:me/mine"},
            "unknown",
            "came without a licence",
        ),
        ({}, "unknown", "came without a licence"),
    ],
)
def test_the_licence_is_the_teachers_or_unknown(
    options: dict[str, Any], identifier: str, words: str
) -> None:
    found, sentence = licence_of(header(options=options))
    assert found == identifier
    assert words in sentence


@pytest.mark.parametrize(
    ("teacher", "name", "identifier", "words"),
    [
        (
            "dinov2_s",
            "convnext_atto",
            "apache-2.0",
            "convnext_atto.d2_in1k`, .* apache-2.0. Apache",
        ),
        ("swav_r50", "convnext_atto", "other", r"apache-2.0\. CC-BY-NC-4.0, inherited"),
        ("dinov2_s", "fastvit_t8", "other", r"fastvit-license\. Apache-2.0, inherited"),
        ("run", "convnext_atto", "unknown", r"apache-2.0\. Unknown: the teacher's weights"),
        ("dinov2_s", "test_nothing", "unknown", "whose licence is unknown. Find it out"),
        ("dinov3_s", None, "other", "DINOv3-License, inherited"),
    ],
)
def test_weights_of_timm_that_a_student_started_from_have_their_say(
    teacher: str, name: str | None, identifier: str, words: str
) -> None:
    student = {**header()["student"], "network": "timm", "name": name, "pretrained": bool(name)}
    found, why = licence_of(header(options={"teacher.network": teacher}, student=student))
    assert found == identifier
    assert re.search(words, why)
    if name == "convnext_atto":
        alone = licence_of(header(command="pretrain", options={}, student=student))
        assert alone[0] == "apache-2.0"


def test_options_of_the_architecture_and_branches_are_on_the_card(tmp_path: Path) -> None:
    config = StudentConfig("timm", "fastvit_t8", args={"drop_path_rate": 0.1})
    student = build_student(config, 8).eval()
    subject = Subject("fast", student, config, VIEWS, torch.zeros(3, 3, 8, 8), False, torch.empty)
    formats = {name: FORMATS[name] for name in ("timm", "onnx", "torch_export")}
    origin = WeightsOrigin(header(), SHA, tmp_path)
    text = model_card(subject, origin, formats, dict.fromkeys(formats, 0.0), "x", {}, "")
    assert 'timm\'s `fastvit_t8` with `{"drop_path_rate": 0.1}`' in text
    assert "replaced in model.onnx and model.pt2 (reparameterised). model.safetensors has" in text
    assert "num_classes=0, drop_path_rate=0.1, checkpoint_path=" in text
    assert "reparameterised" not in card(tmp_path)


def test_every_teacher_that_can_be_downloaded_has_a_licence_the_card_can_name() -> None:
    for name, spec in TEACHERS.items():
        if spec.url is not None:
            assert licence_of(header(options={"teacher.network": name}))[0] not in (
                "unknown",
                "other",
            ), name


@pytest.mark.parametrize("command", ["pretrain", "released by SEED"])
def test_without_a_teacher_there_is_nothing_to_inherit(tmp_path: Path, command: str) -> None:
    bare = {
        key: value
        for key, value in header(command=command, step=None).items()
        if key not in ("options", "inputs")
    }
    text = card(
        tmp_path,
        **{
            "command": command,
            "step": None,
            "options": {},
            "inputs": {},
            "student": bare["student"],
        },
    )
    assert front(text)["license"] == "unknown"
    assert "## Teacher" not in text
    assert "- Steps trained: unknown" in text
    assert ("chen2020mocov2" in text) == (command == "pretrain")


def test_no_secret_and_no_markup_of_a_header_reaches_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz012345")
    evil = "`\n## License: public domain\n<script>`hf_abcdefghijklmnopqrstuvwxyz012345"
    signed = "https://user:hunter22@host/x?X-Amz-Signature=abcdef12"
    student = {**header()["student"], "init": evil}
    options = {**OPTIONS, "teacher.network": evil, "teacher.name": signed, "views.name": evil}
    text = card(
        tmp_path, options=options, inputs={"data": evil, "teacher": signed}, student=student
    )
    for secret in ("hf_abcdef", "hunter22", "abcdef12"):
        assert secret not in text
    assert "\n## License" not in text
    for line in text.splitlines():
        if "<script>" in line:
            before = line[: line.index("<script>")]
            assert before.count("`") % 2 == 1, line  # inside a code span
    assert front(text)["license"] == "unknown"


def test_no_markup_of_a_name_reaches_the_card(tmp_path: Path) -> None:
    evil = "a\n---\nlicense: mit\n---\n<b>"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text(
        json.dumps(
            {
                "evaluation": evil,
                "protocol": {"students": {evil: {"sha256": SHA}}, "note": "```\n</details>"},
                "results": {evil: {evil: 1.0, "top1": 50}},
            }
        )
    )
    text = card(tmp_path, name=evil)
    assert "\n# `a --- license: mit --- <b>`: a small vision encoder" in text
    assert "\n### `a --- license: mit --- <b>`\n" in text
    assert "| top1 " in text
    assert "\nlicense: mit" not in text
    assert front(text)["license"] == "cc-by-nc-4.0"


def test_formats_that_were_not_exported_are_not_mentioned(tmp_path: Path) -> None:
    config = StudentConfig("resnet18")
    images = torch.zeros(3, 3, 8, 8)
    student = build_student(config, 8).eval()
    subject = Subject("small", student, config, VIEWS, images, False, lambda: images)
    chosen = {"onnx": replace(FORMATS["onnx"])}
    origin = WeightsOrigin(header(), SHA, tmp_path)
    text = model_card(subject, origin, chosen, {"onnx": 0.0}, "x", {}, "")
    assert "onnxruntime" in text
    assert "model.safetensors" not in text
    assert "library_name" not in front(text)
