"""`export` from a run folder to files that others load."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seed_exp import export
from seed_exp.config.compose import compose
from seed_exp.config.schema import DataConfig, StudentConfig
from seed_exp.data.sources import load_source
from seed_exp.exporting import formats
from seed_exp.models.students import build_student, load_students, save_student
from seed_exp.tools.export import seen_by

VIEWS = {"eval_size": 48, "eval_resize": 56, "mean": [0.305] * 3, "std": [0.376] * 3}


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


def run(*options: str) -> dict[str, dict[str, float]]:
    return export.export(compose("export", ["run=run", "data.num_workers=0", *options]))


def test_the_printed_line_loads_the_encoder_in_a_process_without_this_package(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = run("networks=['a b']", "formats=[timm]", "output='it\\'s $(x)'")
    assert errors == {"a b": {"timm": pytest.approx(0, abs=1e-5)}}
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("import timm; model = timm.create_model(")
    images = seen_by(load_source(DataConfig("digits"), "train"), VIEWS)
    save_file({"images": images}, "images.safetensors")
    program = f"""import sys
sys.modules["seed_exp"] = None
from safetensors.torch import load_file, save_file
{line}
features = model(load_file("images.safetensors")["images"]).detach()
save_file({{"features": features}}, "features.safetensors")"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run=nowhere"], "no run folder or student file nowhere"),
        (["networks=[b]"], "unknown student of run 'b'"),
        (
            ["formats=[torchscript]"],
            "unknown export format 'torchscript'; .*Known: onnx, timm, torch_export, torchvision",
        ),
        (["formats=[]"], r"formats=\[\] leaves nothing to export"),
        (
            ["networks=[tiny]", "formats=[timm]"],
            "timm has no network that equals tiny; choose formats from onnx, torch_export",
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
        done = subprocess.run(
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
