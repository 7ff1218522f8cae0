"""`detect` on generated images of rectangles in the layouts of VOC and COCO."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import unplugged
from PIL import Image
from rectangles import write_coco, write_voc

from seed_exp import __version__, detect, distill
from seed_exp.base.files import file_hash
from seed_exp.config.compose import compose
from seed_exp.config.options import decisive_options, to_plain
from seed_exp.config.schema import StudentConfig
from seed_exp.data.detection_sets import DetectionSet, load_coco, load_voc
from seed_exp.models.detectors import build_detector
from seed_exp.models.inputs import IMAGENET_MEAN, IMAGENET_STD
from seed_exp.models.students import build_student, save_student

DETECT = [
    "run=run",
    "device=cpu",
    "data.num_workers=0",
    "short_sides=[32,48]",
    "long_side=64",
    "batch_size=2",
    "log_every=1",
]
VOC = [*DETECT, "data.root=voc", "steps=3"]
FEW = {
    "box_batch_size_per_image": 16,
    "rpn_post_nms_top_n_train": 32,
    "rpn_post_nms_top_n_test": 32,
}
"""Proposals: a CPU takes seconds for torchvision's 512 of each image."""
COCO = [*DETECT, "data=coco", "data.root=coco", "steps=2", "masks=true"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tiny ResNet, and both data sets."""
    home = tmp_path_factory.mktemp("made")
    config = StudentConfig("timm", name="test_resnet")
    views = {"eval_size": 64, "eval_resize": 64, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    facts = {"eval_views": views, "command": "distill", "step": 7, "inputs": {}, "options": {}}
    save_student(
        home / "run" / "students" / "tiny.safetensors", build_student(config, 16), config, facts
    )
    write_voc(home / "voc", 2)
    write_coco(home / "coco", 2)
    return home


@pytest.fixture(autouse=True)
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> Path:
    home = tmp_path / "home"
    shutil.copytree(made, home)
    monkeypatch.chdir(home)
    monkeypatch.setattr("seed_exp.protocols.detect.build_detector", partial(build_detector, **FEW))
    return home


def results_of(home: Path) -> dict[str, Any]:
    (path,) = (home / "run" / "results").glob("detect-*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def run_of(home: Path) -> Path:
    (folder,) = (home / "run" / "detect").iterdir()
    return folder


def test_detect_trains_on_voc_and_writes_its_protocol(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose("detect", VOC)
    before = (home / "run" / "students" / "tiny.safetensors").read_bytes()
    results = detect.detect(config)
    printed = capsys.readouterr().out
    assert results.keys() == {"tiny"}
    assert list(results["tiny"]) == ["box_ap", "box_ap50", "box_ap75"]
    assert all(0 <= value <= 100 for value in results["tiny"].values())
    assert "| box_ap | box_ap50 | box_ap75 |" in printed
    rows = [json.loads(line) for line in (run_of(home) / "metrics.jsonl").read_text().splitlines()]
    losses = {
        f"tiny/{key}" for key in ("loss", "classifier", "box_reg", "objectness", "rpn_box_reg")
    }
    assert all(losses <= row.keys() for row in rows if "lr" in row)
    content = results_of(home)
    assert content["results"] == results
    assert content["versions"]["seed_exp"] == __version__
    protocol = content["protocol"]
    options = decisive_options(to_plain(config))
    options.pop("run")
    assert protocol["options"] == options
    assert (protocol["recall_steps"], options["seed"]) == (11, 0)
    assert protocol["train"] == load_voc(home / "voc", "train").fingerprint()
    assert protocol["val"] == load_voc(home / "voc", "val").fingerprint()
    assert protocol["students"]["tiny"]["sha256"] == file_hash(
        home / "run" / "students" / "tiny.safetensors"
    )
    assert (home / "run" / "students" / "tiny.safetensors").read_bytes() == before
    # Typed again, it finds its own run folder inside the run's, and its checkpoint.
    assert detect.detect(config) == results
    assert "resuming after step 3 of 3" in (run_of(home) / "log.txt").read_text()


@pytest.mark.usefixtures("home")
def test_it_goes_on_bit_for_bit_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    unplugged.assert_goes_on_bit_for_bit(
        lambda words: detect.detect(compose("detect", [*VOC, *words])),
        DetectionSet,
        5,
        monkeypatch,
    )


@pytest.mark.parametrize("detector", ["fpn", pytest.param("c4", marks=pytest.mark.slow)])
def test_detect_segments_objects_of_coco(home: Path, detector: str) -> None:
    results = detect.detect(compose("detect", [*COCO, f"detector={detector}"]))
    assert list(results["tiny"]) == [
        f"{kind}_{key}" for kind in ("box", "mask") for key in ("ap", "ap50", "ap75")
    ]
    assert results_of(home)["protocol"]["recall_steps"] == 101
    assert results_of(home)["protocol"]["val"] == load_coco(home / "coco", "val").fingerprint()
    rows = [json.loads(line) for line in (run_of(home) / "metrics.jsonl").read_text().splitlines()]
    assert all("tiny/mask" in row for row in rows if "lr" in row)


@pytest.mark.slow
def test_rectangles_are_learnt(home: Path) -> None:
    write_voc(home / "more", 40)
    options = [
        "data.root=more",
        "epochs=12",
        "batch_size=8",
        "short_sides=[64]",
        "optimizer.lr=1",
        "log_every=10",
    ]
    options += ["steps=null", "optimizer.milestones=[9,11]", "optimizer.warmup_epochs=1"]
    results = detect.detect(compose("detect", [*DETECT, *options]))
    assert results["tiny"]["box_ap50"] > 50


def test_a_broken_training_image_is_replaced_and_a_broken_test_image_is_an_error(
    home: Path,
) -> None:
    (home / "voc" / "VOC2012" / "JPEGImages" / "trainval1.jpg").write_bytes(b"broken")
    detect.detect(compose("detect", [*VOC, "data.max_bad=0.5", "epochs=1", "steps=null"]))
    assert "trainval1" in (run_of(home) / "bad_samples.jsonl").read_text()
    Image.new("RGB", (9, 9)).save(home / "voc" / "VOC2007" / "JPEGImages" / "test0.jpg")
    with pytest.raises(ValueError, match=r"test0\.jpg is \[9, 9\] pixels high and wide"):
        detect.detect(compose("detect", [*VOC, "data.max_bad=0.5", "steps=1", "run_dir=other"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["masks=true"],
            r"masks=true needs data with the objects' outlines, which data=voc lacks; use coco",
        ),
        (["data.root=absent"], r"data\.root=absent does not exist"),
        (["data.root=coco"], r"cannot read coco/VOC2007/ImageSets/Main/trainval\.txt"),
        (["data=digits"], r"detect needs images with boxes around objects.*got data=digits"),
        (["data.fraction=0.5"], r"without data\.fraction"),
        (["detector=c5"], r"unknown detector 'c5'; did you mean 'c4'\?"),
        (["compile=true"], r"detect does not compile"),
        (["precision=auto"], r"detect needs precision=float32, got auto"),
        (
            ["short_sides=[]"],
            r"short_sides must be one or more sizes of at least 32 pixels, got \[\]",
        ),
        (["long_side=40"], r"long_side=40 is below the largest of short_sides"),
        (["networks=[]"], r"networks=\[\] names no student"),
    ],
)
def test_what_detect_cannot_do_is_refused_before_anything_is_written(
    home: Path, options: list[str], message: str
) -> None:
    before = set(home.rglob("*"))
    with pytest.raises(ValueError, match=message):
        detect.detect(compose("detect", [*VOC, *options]))
    assert set(home.rglob("*")) == before


def test_without_pycocotools_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(
        ValueError,
        match=r"detect needs pycocotools, which is not installed; pip install 'seed_exp\[detect\]'",
    ):
        detect.detect(compose("detect", VOC))
    assert compose("distill", ["data=coco"]).data.source == "coco"  # images alone need no library
    assert distill.main is not None
