"""`retrieval` on digits, whose features are pixels of a network that learnt nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import reference
import torch
from PIL import Image

from seed_exp import __version__, retrieval
from seed_exp.base.files import file_hash
from seed_exp.config.compose import compose
from seed_exp.config.schema import StudentConfig
from seed_exp.data.digits import DigitsSource
from seed_exp.evaluation.setup import load_frozen
from seed_exp.models.students import build_student, save_student
from seed_exp.views.recipe import EvalViews

OPTIONS = ["run=run", "data=digits", "data.num_workers=0", "device=cpu"]
STUDENT = Path("run/students/net.safetensors")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    views = {"eval_size": 32, "eval_resize": 32, "mean": [0.3] * 3, "std": [0.4] * 3}
    facts = {"eval_views": views, "command": "distill", "step": 7, "inputs": {}, "options": {}}
    config = StudentConfig("convnet_w2")
    torch.manual_seed(0)
    save_student(STUDENT, build_student(config, 16), config, facts)
    return tmp_path


def folder(classes: dict[str, list[int]], home: Path) -> None:
    """Digits as files, by class; the number chooses the image."""
    digits = DigitsSource("train")
    for name, numbers in classes.items():
        (home / name).mkdir(parents=True)
        for number in numbers:
            pixels = digits.image(number).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(home / name / f"{number}.png")


def test_it_measures_the_validation_images_and_writes_its_protocol(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["retrieval.py", *OPTIONS, "ks=[1,7]"])
    retrieval.main()
    printed = capsys.readouterr().out
    (path,) = Path("run/results").iterdir()
    content = json.loads(path.read_text())
    numbers, protocol = content["results"]["net"], content["protocol"]
    assert list(numbers) == ["map", "recall1", "recall7"]
    assert 10 < numbers["map"] < numbers["recall1"] < numbers["recall7"] < 100
    assert f"{numbers['map']:.2f}" in printed
    assert content["versions"]["seed_exp"] == __version__
    assert protocol["students"]["net"]["sha256"] == file_hash(STUDENT)
    assert (protocol["gallery_split"], protocol["ks"]) == ("train", [1, 7])
    assert (protocol["gallery"], protocol["queries"], protocol["num_queries"]) == (
        DigitsSource("train").fingerprint(),
        DigitsSource("val").fingerprint(),
        360,
    )


def test_leave_one_out_is_the_definition_on_features_of_the_validation_images(
    logged: list[str],
) -> None:
    classes = {"a": [0, 1, 2, 3], "b": [4, 5, 6], "c": [7]}
    folder(classes, Path("images/val"))
    folder({name: [20] for name in classes}, Path("images/train"))
    Path("images/val/b/5.png").write_bytes(b"broken")  # the next one must not be found twice
    options = ["data=image_folder", "data.root=images", "data.max_bad=0.5", "gallery=val"]
    found = retrieval.retrieval(compose("retrieval", [*OPTIONS, *options, "ks=[1,2]"]))
    frozen = load_frozen(Path("run"), None, torch.device("cpu"))
    readable = [0, 1, 2, 3, 4, 6, 7]
    images = [DigitsSource("train").image(number) for number in readable]
    with torch.no_grad():
        inputs = EvalViews(frozen.views).inputs(images)
        features = frozen.students["net"].features(inputs).double().tolist()
    labels = [0, 0, 0, 0, 1, 1, 2]
    expected = reference.retrieval(features, labels, features, labels, [1, 2], [*range(7)])
    assert found["net"] == pytest.approx(expected, abs=1e-3)
    assert any("1 of 7 validation images have no other image" in line for line in logged)


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (
            {"train": {"a": [1], "b": [2]}, "val": {"a": [3], "b": [4]}},
            ["gallery=val"],
            "each of the 2 validation images is the only one of its class; take gallery=train",
        ),
        ({}, ["ks=[]"], r"ks must be one or more numbers of images above 0, got \[\]"),
        ({}, ["ks=[1,1]"], "ks must be different numbers of images"),
        ({}, ["data=photos", "data.val_fraction=0.5"], "evaluation needs labels"),
    ],
)
def test_a_search_without_anything_to_find_is_refused_at_once(
    classes: dict[str, dict[str, list[int]]], options: list[str], message: str
) -> None:
    for split, own in (classes or {"train": {"a": [1, 2, 3]}}).items():
        folder(own, Path("images") / split)
    words = [*OPTIONS, "data=image_folder", "data.root=images", *options]
    with pytest.raises(ValueError, match=message):
        retrieval.retrieval(compose("retrieval", words))
    assert not Path("run/results").exists()
