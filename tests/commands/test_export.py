"""`export` from a run folder to files that others load."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from seed_exp import export
from seed_exp.config.compose import compose
from seed_exp.config.schema import StudentConfig
from seed_exp.data.sources import load_source
from seed_exp.exporting import formats
from seed_exp.models.students import build_student, load_students, save_student
from seed_exp.tools.export import NUM_IMAGES, trial_images

VIEWS = {"eval_size": 48, "eval_resize": 56, "mean": [0.305] * 3, "std": [0.376] * 3}


pytestmark = pytest.mark.usefixtures("exported_files_load_quickly")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run of two networks."""
    for name, network in (("a b", "resnet18"), ("tiny", "convnet_w2")):
        torch.manual_seed(0)
        config = StudentConfig(network)
        facts = {"command": "distill", "step": 2, "eval_views": VIEWS}
        save_student(
            tmp_path / "run" / "students" / f"{name}.safetensors",
            build_student(config, 8),
            config,
            facts,
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def a_subject(home: Path) -> formats.Subject:
    student, _ = load_students(home / "run", ["tiny"])["tiny"]
    student.eval().requires_grad_(False)
    images = torch.randn(4, 3, 48, 48)
    config = StudentConfig("convnet_w2")
    return formats.Subject("tiny", student, config, VIEWS, images, False, lambda: images)


def run(*options: str) -> dict[str, dict[str, float]]:
    return export.export(compose("export", ["run=run", "data.num_workers=0", *options]))


def test_the_printed_line_loads_the_encoder_in_a_process_without_this_package(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = run("networks=['a b']", "formats=[timm]", "output='it\\'s $(x)'")
    assert errors == {"a b": {"timm": pytest.approx(0, abs=1e-5)}}
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("import timm; model = timm.create_model(")
    config = compose("export", ["run=run", "data.num_workers=0"])
    images = trial_images(config, load_source(config.data, "train"), VIEWS).prepared(NUM_IMAGES)
    save_file({"images": images}, "images.safetensors")
    program = f"""import sys
sys.modules["seed_exp"] = None
from safetensors.torch import load_file, save_file
{line}
features = model(load_file("images.safetensors")["images"]).detach()
save_file({{"features": features}}, "features.safetensors")"""
    done = forks.run(
        [sys.executable, "-c", program],
        imported=forks.LIBRARIES,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    student, _ = load_students(home / "run", ["a b"])["a b"]
    with torch.no_grad():
        expected = student.eval().features(images)
    torch.testing.assert_close(load_file("features.safetensors")["features"], expected)


def test_each_network_gets_a_folder_of_all_its_formats_with_a_card(home: Path) -> None:
    run("networks=[tiny]", "formats=[torch_export]", "head=true")
    folder = home / "run" / "export" / "tiny"
    assert {path.name for path in folder.iterdir()} == {"README.md", "model.pt2"}
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    card = (folder / "README.md").read_text()
    assert "features, embeddings = program(images)" in card
    assert "digits:" in card
    with pytest.raises(
        ValueError, match="run/export/tiny exists already; delete it, or choose another output"
    ):
        run("networks=[tiny]", "formats=[torch_export]")


def test_a_file_that_gives_other_features_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_a_percent_off(subject: formats.Subject, folder: Path) -> None:
        weights = subject.student.encoder.state_dict()
        save_file(
            {
                key: value * 1.005 if key == "conv1.weight" else value.contiguous()
                for key, value in weights.items()
            },
            folder / "model.safetensors",
        )

    timm = formats.FORMATS["timm"]
    monkeypatch.setitem(formats.FORMATS, "timm", replace(timm, write=half_a_percent_off))
    with pytest.raises(
        ValueError,
        match=r"relative error 0\.0\d+ on 16 images, at most 0.0001 is allowed"
        r".* Nothing was exported",
    ):
        run("networks=['a b']", "formats=[timm]", "output=out")
    assert list((home / "out").iterdir()) == []


@pytest.fixture
def photos(home: Path) -> list[str]:
    """Options of labelled images, one of which cannot be read."""
    for split, num in (("train", 24), ("val", 8)):
        for number in range(num):
            path = home / "photos" / split / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 256, (3, 4, 3), np.uint8)
            Image.fromarray(noise).resize((60, 60)).save(path)
    (home / "photos" / "train" / "a" / "06.png").write_bytes(b"broken")
    return ["data=image_folder", "data.root=photos", "networks=[tiny]", "formats=[onnx_int8]"]


def test_int8_gets_its_name_only_if_it_keeps_what_is_asked(
    home: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    made = formats.Subject.onnx.func(subject := a_subject(home))  # once for all three
    monkeypatch.setattr(formats.Subject, "onnx", made)
    assert subject.onnx is made
    with pytest.raises(ValueError, match="1 of 24 images cannot be read"):
        run(*photos, "data.max_bad=0.01")
    with pytest.raises(
        ValueError,
        match=r"model_int8\.onnx: .* mean cosine of 0\.\d+ .* at least 1 is required "
        r"\(min_cosine\)\. Nothing was exported",
    ):
        run(*photos, "data.max_bad=0.1", "min_cosine=1")
    assert not (home / "run" / "export" / "tiny").exists()
    run(*photos, "data.max_bad=0.1", "min_cosine=0.8", "max_knn_drop=100")
    folder = home / "run" / "export" / "tiny"
    assert {path.name for path in folder.iterdir()} == {"README.md", "model_int8.onnx"}
    (bad,) = (home / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert "06.png" in bad
    card = (folder / "README.md").read_text()
    row = r"\| {} +\| +[\d.]+ MB \| +{} \| +[\d.]+ \|"
    assert re.search(row.format("onnx", r"1\.00000"), card)
    assert re.search(row.format("onnx_int8", r"0\.\d{5}"), card)
    assert "Measured on 8 validation images of `image_folder" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run=nowhere"], "no run folder or student file nowhere"),
        (["networks=[b]"], "unknown student of run 'b'"),
        (
            ["formats=[torchscript]"],
            "unknown export format 'torchscript'; .*Known: onnx, onnx_fp16, onnx_int8, timm, ",
        ),
        (["formats=[]"], r"formats=\[\] leaves nothing to export"),
        (
            ["networks=[tiny]", "formats=[timm]"],
            "timm has no network that equals tiny; choose formats from onnx, onnx_fp16, onnx_int8",
        ),
        (["push=me/x"], r"push takes one network, run has a b, tiny; choose it with networks=\["),
        (["networks=[tiny]", "push=../x"], r"push=\.\./x names no repository"),
        (
            ["networks=[tiny]", "data=image_folder", "data.root=none"],
            "data.root=none does not exist",
        ),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(
    home: Path, options: list[str], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*options)
    assert sorted(path.name for path in home.rglob("*")) == [
        "a b.safetensors",
        "run",
        "students",
        "tiny.safetensors",
    ]


def test_without_onnx_the_format_says_what_to_install(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ValueError,
        match=r"formats=\[onnx\] needs onnxscript, which is not installed; "
        r"pip install 'seed_exp\[export\]'",
    ):
        run("networks=[tiny]", "formats=[onnx]")


def test_a_header_that_leads_elsewhere_writes_nothing_elsewhere(home: Path) -> None:
    path = home / "run" / "students" / "tiny.safetensors"
    config = StudentConfig("convnet_w2")
    facts = {
        "command": "../../x",
        "step": "`x`",
        "eval_views": VIEWS,
        "options": {"teacher.network": "../../y"},
    }
    save_student(path, build_student(config, 8), config, facts)
    run("networks=[tiny]", "formats=[torch_export]")
    outside = {path.relative_to(home) for path in home.rglob("*")} - {
        path.relative_to(home) for path in (home / "run").rglob("*")
    }
    assert outside == {Path("run")}


@pytest.mark.slow
def test_a_distilled_network_is_exported_as_a_user_would(tmp_path: Path) -> None:
    small = [
        "data=digits",
        "data.num_workers=0",
        "device=cpu",
        "views=digits",
        "tracker=files",
        "batch_size=16",
        "steps=2",
    ]
    small += ["knn_bank_size=50", "knn_query_size=20"]
    lines = [
        ["pretrain", "student=convnet_w2", "run_dir=teacher", "moco.queue_size=32", *small],
        [
            "distill",
            "student=resnet18",
            "teacher=run",
            "teacher.checkpoint=teacher",
            "run_dir=d",
            "objective.queue_size=32",
            *small,
        ],
        ["knn", "run=d", "data=digits", "data.num_workers=0", "device=cpu", "ks=[5]"],
        ["export", "run=d"],
    ]
    for name, *options in lines:
        done = forks.run(
            [sys.executable, "-m", f"seed_exp.{name}", *options],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "d" / "export" / "resnet18"
    names = {"README.md", "config.json", "model.safetensors", "model.onnx", "model.pt2"}
    assert {path.name for path in folder.iterdir()} == names
    card = (folder / "README.md").read_text()
    assert "knn5_majority" in card
    assert "- Objective: `seed`" in card
    assert json.loads((folder / "config.json").read_text())["architecture"] == "resnet18"
