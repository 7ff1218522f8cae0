"""Commands on trained students take images and views from the run, and the command line wins."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from seed_exp import embed, knn
from seed_exp.base.files import write_json
from seed_exp.base.redaction import redact_all
from seed_exp.config.compose import compose
from seed_exp.config.options import decisive_options, to_plain
from seed_exp.protocols.follow_up import plan_evaluations
from seed_exp.protocols.knn import possible_ks

SIZES = ["views.crops.global.size=90", "views.eval_size=96", "views.eval_resize=104"]
TRAINED = ["student=convnet_w2", "data=image_folder", "data.val_fraction=0.25", *SIZES]
TRAINED += ["views.mean=[0.1,0.2,0.3]", "views.std=[0.4,0.5,0.6]"]
OF_RUN = ["knn", "retrieval", "linear", "finetune", "embed", "export"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.delenv("SEED_DATA", raising=False)


def trained(*options: str, folder: str = "my run, {1}") -> str:
    """A run folder with config.json and a student's file; returns the word that names it."""
    config = compose("pretrain", [*TRAINED, *options])
    plain = redact_all(to_plain(config))
    write_json(Path(folder) / "config.json", {"command": "pretrain", "options": plain})
    (Path(folder) / "students").mkdir()
    header = {"options": decisive_options(plain)}
    save_file(
        {"x": torch.zeros(1)},
        Path(folder) / "students" / "a.safetensors",
        {"seed_exp": json.dumps(header)},
    )
    return f'run="{folder}"'


def views_of(config: Any) -> tuple[Any, ...]:
    views = config.views
    return views.crops["global"].size, views.eval_size, views.eval_resize, views.mean, views.std


OWN = (90, 96, 104, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


@pytest.mark.parametrize("inside", ["", "/students/a.safetensors"])
def test_images_and_views_are_those_of_the_run(inside: str) -> None:
    trained('data.root="my photos, 2019"', folder="r")
    for name in OF_RUN:
        config = compose(name, [f"run=r{inside}"])
        images = config.data
        assert (images.source, images.root, images.val_fraction) == (
            "image_folder",
            "my photos, 2019",
            0.25,
        )
        if name in ("linear", "finetune"):
            assert views_of(config) == OWN
            assert (config.views.name, config.views.crops["global"].num) == ("linear", 1)


def test_the_command_line_wins() -> None:
    run = trained("data.root=photos", "data.val_root=held_out", "data.subset=list.txt")
    other = compose("linear", [run, "data=digits", "views=linear_digits"])
    assert (other.data.source, other.data.root, other.data.subset) == ("digits", None, None)
    assert (other.views.eval_size, other.views.mean) == (32, [0.305] * 3)
    part = compose("linear", [run, "data.root=others", "views.eval_size=80"])
    assert (part.data.source, part.data.root) == ("image_folder", "others")
    # They say nothing about other images.
    assert (part.data.val_root, part.data.subset) == (None, None)
    assert (part.views.eval_size, part.views.eval_resize) == (80, 104)


def test_a_run_that_cannot_be_read_leaves_the_defaults() -> None:
    Path("broken").mkdir()
    Path("broken/config.json").write_text('{"options": 3}')
    Path("student.pth").write_bytes(b"no weights")
    for run in ("nowhere", "broken", "student.pth", "."):
        assert compose("knn", [f"run={run}"]).data.source == "imagenet"


def test_detection_takes_only_images_with_objects_from_the_run() -> None:
    run = trained("data.root=photos")
    with pytest.raises(ValueError, match="data=voc or data=coco"):
        compose("detect", [run, "data=digits"])
    assert compose("detect", [run]).data.source == "voc"


def test_a_machine_with_another_place_for_imagenet_uses_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = trained("data=imagenet", "data.root=/nowhere/imagenet", "data.fraction=0.1")
    assert compose("knn", [run]).data.root == "/nowhere/imagenet"
    monkeypatch.setenv("SEED_DATA", str(tmp_path))
    data = compose("knn", [run]).data
    assert (data.root, data.fraction) == (str(tmp_path), 0.1)


def test_an_address_whose_secret_is_not_recorded_is_asked_for() -> None:
    run = trained('data.root="https://me:canary99@h/x"')
    with pytest.raises(ValueError, match=r"data\.root=https://\*\*\*@h/x had a secret"):
        compose("knn", [run])
    assert compose("knn", [run, "data.root=x"]).data.root == "x"


def test_a_run_of_others_cannot_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "canary99")
    options = {"data": {"source": "image_folder", "root": "${oc.env:MY_PASSWORD}"}}
    write_json(Path("theirs/config.json"), {"command": "distill", "options": options})
    with pytest.raises(ValueError, match=r"theirs records data\.root=") as refused:
        compose("knn", ["run=theirs"])
    assert "canary99" not in str(refused.value)


def test_the_command_itself_and_a_sweep_over_runs_do_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    got: list[Any] = []
    monkeypatch.setattr("seed_exp.protocols.knn.knn", got.append)
    trained("data.root=one", folder="a")
    trained("data.root=two", folder="b")
    monkeypatch.setattr(sys, "argv", ["knn.py", "-m", "run=a,b", "batch_size=7"])
    knn.main()
    assert [(config.data.root, config.batch_size) for config in got] == [("one", 7), ("two", 7)]
    monkeypatch.setattr("seed_exp.tools.embed.embed", got.append)
    words = shlex.split("embed.py 'run=\"a\"' data.val_fraction=0.5")
    monkeypatch.setattr(sys, "argv", words)
    embed.main()
    assert (got[-1].data.root, got[-1].data.val_fraction) == ("one", 0.5)


def test_an_evaluation_in_the_same_job_has_the_views_of_the_training() -> None:
    lines = 'evaluations=["linear epochs=3","linear views=linear_digits"]'
    config = compose("pretrain", [*TRAINED, "data.root=photos", lines])
    own, chosen = (planned.config for planned in plan_evaluations(config))
    assert views_of(own) == OWN
    assert (chosen.views.eval_size, chosen.data.root) == (32, "photos")


def test_knn_counts_no_more_neighbours_than_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert possible_ks([10, 20, 200], 200) == [10, 20, 200]
    assert capsys.readouterr().out == ""
    assert possible_ks([10, 20, 200], 15) == [10, 15]
    assert capsys.readouterr().out == ("k=20, k=200: there are 15 training images; k=15 instead\n")
