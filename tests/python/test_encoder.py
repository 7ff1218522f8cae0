"""`seed_exp.load`: the features of the commands, of whatever holds an image."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import seed_exp
from seed_exp.config.schema import DataConfig
from seed_exp.data.sources import load_source


def image(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def encoder(run: Any) -> Any:
    return seed_exp.load(run)


def test_features_are_those_that_embed_writes(run: Any, encoder: Any) -> None:
    with np.load(seed_exp.embed(run, output="all.npz", batch_size=100).file) as written:
        wanted = torch.from_numpy(written["convnet_w2"])
    source = load_source(DataConfig("digits"), "train")
    pixels = torch.stack([source.image(index) for index in range(200)])
    found = encoder.features(pixels, batch_size=100)
    assert torch.equal(found, wanted[:200])


def test_every_way_to_give_an_image_gives_the_same_features(encoder: Any, tmp_path: Path) -> None:
    one, two = image(seed=1), image(70, 90, seed=2)
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    one.save(paths[0])
    two.save(paths[1])
    pixels = [torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in (one, two)]
    inputs = [encoder.transform(each) for each in (one, two)]
    wanted = encoder.features([one, two])
    assert (wanted.shape, wanted.dtype, wanted.device.type) == ((2, 16), torch.float32, "cpu")
    for images in (
        (one, two),
        iter([one, two]),
        paths,
        list(map(str, paths)),
        pixels,
        inputs,
        torch.stack(inputs),
        [torch.stack(inputs[:1]), [two]],
        [one, inputs[1]],
    ):
        assert torch.equal(encoder.features(images), wanted)
    for single in (one, paths[0], str(paths[0]), pixels[0], inputs[0]):
        assert torch.allclose(encoder.features(single), wanted[:1], atol=1e-6)
    assert torch.allclose(encoder.features([one, two], batch_size=1), wanted, atol=1e-6)
    assert encoder.features([]).shape == (0, 16)


def test_a_photo_is_turned_upright_whether_opened_or_named(encoder: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    opened = Image.open(tmp_path / "turned.jpg")
    assert torch.equal(encoder.transform(opened), encoder.transform(tmp_path / "turned.jpg"))
    lying = Image.fromarray(np.array(opened))
    assert not torch.equal(encoder.transform(opened), encoder.transform(lying))


def test_the_transform_can_be_pickled(encoder: Any) -> None:
    again = pickle.loads(pickle.dumps(encoder.transform))
    assert torch.equal(again(image()), encoder.transform(image()))
    assert "crop=32" in repr(again)


def test_info_says_what_the_encoder_is(run: Any) -> None:
    for ks in ([5], [7]):
        seed_exp.knn(run, ks=ks)
    info = seed_exp.load(run).info
    assert (info.name, info.network, info.image_size) == ("convnet_w2", "convnet_w2", 32)
    assert (info.method, info.teacher, info.steps) == ("distill, seed", "run", 2)
    assert info.results["knn"].keys() >= {"knn5_majority", "knn7_majority", "knn7_weighted"}
    assert info.licence.startswith("Unknown: ")
    assert info.images.startswith("digits:train:1437:")
    assert info.options["objective.queue_size"] == 64


def test_a_pretrained_network_loads_too(teacher: Any) -> None:
    info = seed_exp.load(teacher.students["convnet_w32"]).info
    assert (info.method, info.teacher) == ("pretrain", None)


def test_the_encoder_stays_in_the_mode_that_the_caller_chose(encoder: Any) -> None:
    encoder.encoder.train()
    before = {name: value.clone() for name, value in encoder.encoder.state_dict().items()}
    encoder.features(image())
    assert encoder.encoder.training
    assert all(torch.equal(encoder.encoder.state_dict()[key], before[key]) for key in before)
    encoder.encoder.eval()


def test_of_several_students_one_is_chosen(distilled: Any) -> None:
    fleet = distilled(student=["convnet_w2", "convnet_w32"])
    assert fleet.load("convnet_w32").info.name == "convnet_w32"
    with pytest.raises(ValueError, match=r"several students; .*: convnet_w2, convnet_w32"):
        seed_exp.load(fleet)
    with pytest.raises(ValueError, match="did you mean 'convnet_w2'"):
        seed_exp.load(fleet, "convnet_w")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "got int, expected PIL images"),
        (torch.zeros(3, 4, dtype=torch.uint8), r"got Tensor of torch.uint8, shape \(3, 4\)"),
        (torch.zeros(1, 8, 8), r"got Tensor of torch.float32, shape \(1, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "torch.int64"),
        (np.zeros((8, 8, 3), np.uint8), r"got ndarray .* shape \(8, 8, 3\).* make a PIL image"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], "must have one size"),
        ("not/there.jpg", "cannot read image not/there.jpg: No such file"),
        (".", r"cannot read image \.: Is a directory; seed_exp.embed takes folders"),
        (__file__, "cannot decode image"),
    ],
)
def test_anything_else_is_a_value_error(encoder: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.features(given)


def test_a_folder_without_students_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no students; expected"):
        seed_exp.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run folder or student file"):
        seed_exp.load(tmp_path / "nothing")


def test_a_half_written_file_is_said(run: Any, tmp_path: Path) -> None:
    content = run.students["convnet_w2"].read_bytes()
    for length in (0, 5, 300, len(content) - 1):
        (tmp_path / "half.safetensors").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"half\.safetensors"):
            seed_exp.load(tmp_path / "half.safetensors")


def test_a_newer_version_s_file_is_said(run: Any, tmp_path: Path) -> None:
    path = run.students["convnet_w2"]
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["seed_exp"])
    header["student"]["gates"] = 3
    newer = tmp_path / "newer.safetensors"
    save_file(load_file(path), newer, {"seed_exp": json.dumps(header)})
    with pytest.raises(ValueError, match=r"by 'gates', which seed_exp .* a newer version wrote it"):
        seed_exp.load(newer)
