"""`segment` on generated images of textured rectangles in the layouts that it reads."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import unplugged
from PIL import Image
from textures import NUM_CLASSES, write_masks

from seed_exp import __version__, segment
from seed_exp.base.files import file_hash
from seed_exp.config.compose import compose
from seed_exp.config.options import decisive_options, to_plain
from seed_exp.config.schema import StudentConfig
from seed_exp.data.mask_sets import MaskedImages
from seed_exp.data.sources import load_source
from seed_exp.models.inputs import IMAGENET_MEAN, IMAGENET_STD
from seed_exp.models.students import build_student, save_student
from seed_exp.protocols.follow_up import plan_evaluations

STUDENTS = {
    "net": StudentConfig("convnet_w32"),
    "vit": StudentConfig("timm", name="test_vit"),
}
SEGMENT = [
    "run=run",
    "networks=[net]",
    "device=cpu",
    "data=mask_folder",
    "data.root=masks",
    "data.num_workers=0",
    "crop_size=48",
    "batch_size=4",
    "log_every=1",
    "steps=3",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two untrained students, and images with masks."""
    home = tmp_path_factory.mktemp("made")
    views = {"eval_size": 48, "eval_resize": 48, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    facts = {"eval_views": views, "command": "distill", "step": 7, "inputs": {}, "options": {}}
    for name, config in STUDENTS.items():
        torch.manual_seed(0)
        file = home / "run" / "students" / f"{name}.safetensors"
        save_student(file, build_student(config, 16), config, facts)
    write_masks(home / "masks", {"train": (0, 12), "val": (100, 4)})
    return home


@pytest.fixture(autouse=True)
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> Path:
    home = tmp_path / "home"
    shutil.copytree(made, home)
    monkeypatch.chdir(home)
    return home


def run_of(home: Path) -> Path:
    (folder,) = (home / "run" / "segment").iterdir()
    return folder


def test_segment_trains_classifiers_and_writes_its_protocol(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SEGMENT, "networks=null"]
    files = {name: home / "run" / "students" / f"{name}.safetensors" for name in STUDENTS}
    before = {name: file_hash(file) for name, file in files.items()}
    monkeypatch.setattr(sys, "argv", ["segment.py", *words])
    segment.main()
    assert "| segmentation, % |  miou | pixel_accuracy |" in capsys.readouterr().out
    (path,) = (home / "run" / "results").glob("segment-*.json")
    content = json.loads(path.read_text())
    results, protocol = content["results"], content["protocol"]
    assert results.keys() == STUDENTS.keys()
    for numbers in results.values():
        assert list(numbers) == ["miou", "pixel_accuracy"]
        assert all(0 <= value <= 100 for value in numbers.values())
    config = compose("segment", words)
    options = decisive_options(to_plain(config))
    options.pop("run")
    assert (protocol["options"], content["versions"]["seed_exp"]) == (options, __version__)
    assert (protocol["num_classes"], protocol["batch_size"]) == (NUM_CLASSES, 4)
    for split in ("train", "val"):
        assert protocol[split] == load_source(config.data, split).fingerprint()
    assert {name: record["sha256"] for name, record in protocol["students"].items()} == before
    assert {name: file_hash(file) for name, file in files.items()} == before
    rows = [json.loads(line) for line in (run_of(home) / "metrics.jsonl").read_text().splitlines()]
    assert all(f"{name}/train_pixel_accuracy" in rows[0] for name in STUDENTS)
    assert rows[-1]["vit/miou"] == results["vit"]["miou"]
    # Typed again, it finds its own run folder inside the run's, and its checkpoint.
    assert segment.segment(config) == results
    assert "resuming after step 3 of 3" in (run_of(home) / "log.txt").read_text()


@pytest.mark.usefixtures("home")
def test_it_goes_on_bit_for_bit_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    unplugged.assert_goes_on_bit_for_bit(
        lambda words: segment.segment(compose("segment", [*SEGMENT, *words])),
        MaskedImages,
        9,
        monkeypatch,
    )


def test_textures_are_learnt_from_maps_of_a_network_that_learnt_nothing(home: Path) -> None:
    write_masks(home / "more", {"train": (0, 40), "val": (100, 10)})
    options = ["data.root=more", "steps=60", "batch_size=8", "scales=[1,1]", "optimizer.lr=0.3"]
    numbers = segment.segment(
        compose("segment", [*SEGMENT, *options, "recalibrate_bn=true", "log_every=20"])
    )
    assert numbers["net"]["miou"] > 50  # 16 to 20 if it says background everywhere
    (path,) = (home / "run" / "results").glob("segment-*.json")
    assert "running statistics" in json.loads(path.read_text())["protocol"]["recalibrate_bn"]


def test_a_training_on_images_with_masks_can_be_followed_by_it() -> None:
    words = ["student=convnet_w2", "views=digits", "device=cpu", "tracker=files", "seed=3"]
    training = compose(
        "pretrain",
        [*words, "data=mask_folder", "data.root=masks", "evaluations=['segment crop_size=32']"],
    )
    (planned,) = plan_evaluations(training)
    assert (planned.config.data.root, planned.config.crop_size) == ("masks", 32)
    assert (planned.config.seed, planned.config.steps) == (3, 40000)
    other = compose("pretrain", [*words, "data=digits", "evaluations=[segment]"])
    assert plan_evaluations(other)[0].config.data.source == "ade20k"


def break_masks(name: str) -> None:
    """Makes one thing in masks/ wrong."""
    masks = Path("masks/masks")
    if name == "missing":
        (masks / "train" / "train1.png").unlink()
    elif name == "size":
        Image.new("L", (9, 9)).save(masks / "val" / "val1.png")
    elif name == "strip":
        Image.new("RGB", (20, 400)).save("masks/images/val/val1.jpg")
        Image.new("L", (20, 400)).save(masks / "val" / "val1.png")
    elif name == "unreadable":
        Path("masks/images/val/val1.jpg").write_bytes(b"no image")
    elif name:
        part, value = {"ignored": ("train", 255), "one": ("train", 2)}.get(name, ("val", 255))
        for file in (masks / part).iterdir():
            Image.new("L", Image.open(file).size, value).save(file)


@pytest.mark.parametrize(
    ("wrong", "options", "message"),
    [
        ("missing", [], r"1 of 12 images have no mask: .*train1\.jpg needs masks/.*train1\.png"),
        ("size", [], r"mask .*val1\.png is \[9, 9\] pixels high and wide, its image .*val1\.jpg"),
        ("strip", [], r"at most 16 times the shorter one"),
        ("unreadable", [], r"cannot read image .*val1\.jpg: an unknown format"),
        ("ignored", [], r"the pixels of 12 training masks show no class: all are 255"),
        ("one", [], r"12 training masks show only class 2"),
        ("nothing to count", [], r"no pixel of 4 validation masks has a class"),
        ("", ["num_classes=3"], r"has the value 3; the classes are 0 to 2, and 255 is ignored"),
        ("", ["num_classes=1"], r"num_classes is for data=mask_folder, from 2 to 255"),
        ("", ["data=voc_masks", "num_classes=3"], r"num_classes is for data=mask_folder"),
        ("", ["data.root=absent"], r"data\.root=absent does not exist"),
        ("", ["data=digits"], r"segment needs images with masks.*got data=digits"),
        ("", ["crop_size=50", "networks=[vit]"], r"student vit gives no feature maps of.*50 x 50"),
        ("", ["networks=[plain]"], r"student plain has no feature maps: its network has no forw"),
        ("", ["crop_size=8"], r"crop_size must be at least 16 pixels, got 8"),
        ("", ["scales=[2,1]"], r"scales must be \[smallest, largest\]"),
        ("", ["views.operations=[x]"], r"segment takes no views\.operations, got \['x'\]"),
        ("", ["views.mixup=true"], r"segment does not take views\.mixup=true"),
    ],
)
def test_what_cannot_be_learnt_is_refused_before_training(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: str,
    options: list[str],
    message: str,
) -> None:
    break_masks(wrong)
    if "plain" in str(options):
        monkeypatch.setattr("seed_exp.models.maps.has_maps", lambda _: False)
        shutil.copy("run/students/net.safetensors", "run/students/plain.safetensors")
    before = set(home.rglob("*"))
    with pytest.raises(ValueError, match=message) as refused:
        segment.segment(compose("segment", [*SEGMENT, *options]))
    assert len(str(refused.value).splitlines()) == 1
    assert set(home.rglob("*")) == before
