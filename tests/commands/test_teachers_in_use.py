"""Teachers beyond the paper's, through the commands.

A ViT of timm, narrower embeddings, released students.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from seed_exp import distill, knn
from seed_exp.base.files import file_hash
from seed_exp.config.compose import compose
from seed_exp.data.sources import load_source
from seed_exp.data.subsets import evenly_spaced
from seed_exp.models.student_header import read_header
from seed_exp.models.students import build_student, load_students
from seed_exp.models.teachers import build_teacher
from seed_exp.tools import plan as tools_plan
from seed_exp.training.teacher_reduction import cached_reduction
from seed_exp.views.crops import resize_center_crop

# The teacher's own objective would look for a temperature, which random weights do not have.
VIT = ["teacher=timm", "teacher.name=test_vit", "teacher.checkpoint=vit.safetensors"]
VIT += ["objective=seed"]
SIZES = [
    "views.crops.global.size=64",
    "views.crops.local.size=40",
    "views.crops.local.num=2",
    "views.eval_size=64",
]
RUN = [
    "student=[convnet_w2,convnet_w32]",
    "views=swav_multicrop",
    *SIZES,
    "steps=3",
    "batch_size=8",
    "log_every=1",
]
DATA = [
    "data=tsv",
    "data.root=images.tsv",
    "data.num_workers=0",
    "device=cpu",
    "tracker=files",
    "objective.queue_size=32",
]
DISTILL = [*VIT, *RUN, *DATA]
PLAN: dict[str, Any] = {"seconds": 0, "num_images": 100, "gpus": 1}


def save_vit(name: str, path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    save_file(model.state_dict(), path)


@pytest.fixture(autouse=True)
def home(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> Path:
    """A working directory with photographs and a ViT with random weights.

    Puts the package's logger back afterwards.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEED_CACHE", str(tmp_path / "cache"))
    shutil.copy(shared / "data" / "imagenet_samples.tsv", "images.tsv")
    save_vit("test_vit", tmp_path / "vit.safetensors")
    return tmp_path


def run(*options: str) -> Path:
    return distill.distill(compose("distill", [*DISTILL, *options]))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_students(one: Path, other: Path) -> None:
    for (ours, _), (theirs, _) in zip(
        load_students(one).values(), load_students(other).values(), strict=True
    ):
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key]), key


def test_a_vit_is_distilled_into_two_students(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["distill.py", *DISTILL, "run_dir=out"])
    distill.main()
    assert {path.stem for path in Path("out/students").iterdir()} == {"convnet_w2", "convnet_w32"}
    for name in ("convnet_w2", "convnet_w32"):
        header = read_header(home / "out" / "students" / f"{name}.safetensors")
        assert header is not None
        assert (header["embedding_dim"], header["inputs"]["teacher"]) == (
            64,
            file_hash(home / "vit.safetensors"),
        )
        rows = metrics(home / "out")
        assert all(0 < row[f"{name}/loss"] < 100 for row in rows)
        assert all(-1 <= row[f"{name}/teacher_cosine"] <= 1 for row in rows)


def test_the_folder_is_named_after_the_network_of_timm() -> None:
    assert run("steps=1").name.startswith("convnet_w2+convnet_w32-test_vit-swav_multicrop-tsv-")


@pytest.mark.parametrize("kind", ["pca", "whiten"])
def test_a_reduction_is_fitted_on_images_spread_over_all_and_kept(
    kind: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"teacher.reduce={kind}", "teacher.embedding_dim=6", "teacher.num_reduce_images=20"]
    first = run(*options, "run_dir=first")
    ((_, header), _) = load_students(first).values()
    assert header["embedding_dim"] == 6
    assert "reduced from 64 to 6 numbers" in (first / "log.txt").read_text()

    (file,) = (home / "cache" / "reductions").iterdir()
    config = compose("distill", [*DISTILL, *options])
    source = load_source(config.data, "train")
    teacher = build_teacher(config.teacher, "")
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (config.views.mean, config.views.std)
    )
    rows = []
    for index in evenly_spaced(67, 20).tolist():
        view = torch.empty(3, 64, 64, dtype=torch.uint8)
        resize_center_crop(source.image(index), config.views.eval_resize, view)
        images = ((view.float() / 255 - mean) / std * std + mean - 0.5) / 0.5
        rows.append(F.normalize(teacher.encoder(images[None]), dim=1)[0].detach())
    kept = load_file(file)
    torch.testing.assert_close(kept["mean"], torch.stack(rows).mean(0), atol=1e-5, rtol=0)
    centred = torch.stack(rows).double() - torch.stack(rows).double().mean(0)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    scale = singular[:6] / 20**0.5 if kind == "whiten" else 1
    expected = centred @ (components[:6].T / scale)
    found = centred @ kept["components"].double()
    torch.testing.assert_close(
        found @ found.T,
        expected @ expected.T,
        atol=1e-3 * float((expected @ expected.T).max()),
        rtol=0,
    )

    # Whoever comes next, to go on or with another student, has the same numbers.
    monkeypatch.setattr("seed_exp.training.teacher_reduction.fitted_reduction", None)
    again = run(*options, "run_dir=again")
    assert_same_students(first, again)
    assert (first / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()


def test_a_run_goes_on_with_the_reduction_that_it_began_with(home: Path) -> None:
    options = ["teacher.reduce=pca", "teacher.embedding_dim=6", "checkpoint_every=1"]
    straight, stopped = run(*options, "run_dir=straight"), run(*options, "run_dir=stopped")
    for path in [stopped / "done.json", *sorted((stopped / "checkpoints").iterdir())[1:]]:
        path.unlink()
    (file,) = (home / "cache" / "reductions").iterdir()
    tensors = load_file(file)
    save_file(
        {**tensors, "components": -tensors["components"]}, file
    )  # as another machine may fit it
    run(*options, "run_dir=stopped")
    assert_same_students(straight, stopped)
    assert (straight / "metrics.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()
    kept = stopped / "reduction.safetensors"
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"stopped/reduction\.safetensors is damaged .*; put back a good copy"
    ):
        run(*options, "run_dir=stopped")
    kept.unlink()
    with pytest.raises(
        ValueError, match=r"stopped/reduction\.safetensors is gone, which stopped was trained with"
    ):
        run(*options, "run_dir=stopped")


def test_a_run_with_maps_goes_on_with_the_scale_that_it_began_with(home: Path) -> None:
    options = ["objective.dense_weight=1", "teacher.num_reduce_images=20", "checkpoint_every=1"]
    straight, stopped = run(*options, "run_dir=straight"), run(*options, "run_dir=stopped")
    (kept,) = sorted((straight / "checkpoints").iterdir())[-1:]
    carried = torch.load(kept, weights_only=True)["carried"]
    config = compose("distill", [*DISTILL, *options])
    source, teacher = load_source(config.data, "train"), build_teacher(config.teacher, "")
    teacher.adapt_to(config.views)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (config.views.mean, config.views.std)
    )
    tokens = []
    for index in evenly_spaced(67, 20).tolist():
        view = torch.empty(3, 64, 64, dtype=torch.uint8)
        resize_center_crop(source.image(index), config.views.eval_resize, view)
        images = teacher.inputs((((view.float() / 255) - mean) / std)[None])
        patches = teacher.encoder.forward_features(images)[0, teacher.encoder.num_prefix_tokens :]
        tokens.append(patches.detach().double())
    rows = torch.cat(tokens)
    torch.testing.assert_close(carried["dense.mean"].double(), rows.mean(0), atol=1e-4, rtol=1e-4)
    expected = 1 / rows.std(0, correction=0)
    torch.testing.assert_close(carried["dense.factor"].double(), expected, atol=1e-4, rtol=1e-3)

    for path in [stopped / "done.json", *sorted((stopped / "checkpoints").iterdir())[1:]]:
        path.unlink()
    (file,) = (home / "cache" / "maps").iterdir()
    save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file)
    run(*options, "run_dir=stopped")
    assert_same_students(straight, stopped)
    assert (straight / "metrics.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()
    assert "convnet_w32/loss_dense_local" in metrics(straight)[0]
    for refuse in (run, lambda *words: tools_plan.plan("distill", [*DISTILL, *words], **PLAN)):
        with pytest.raises(ValueError, match=r"teacher_cache=kept holds embeddings, .* 0\.\d+ GB"):
            refuse(*options, "teacher_cache=kept")
    (row,) = tools_plan.plan("distill", [*DISTILL, *options], **PLAN).jobs
    (plain,) = tools_plan.plan("distill", DISTILL, **PLAN).jobs
    assert row.checkpoints > plain.checkpoints, "map heads"


def test_regression_learns_phi_s_targets_that_other_objectives_see_at_unit_length(
    home: Path,
) -> None:
    options = ["teacher.reduce=phi_s", "teacher_cache=embeddings", "steps=1"]
    first = run(*options, "objective=regression", "run_dir=regression")
    run(*options, "run_dir=seed")
    assert len(list((home / "cache" / "reductions").iterdir())) == 1, "one fit for both"
    assert len(list((home / "embeddings").iterdir())) == 2, "of other lengths"
    assert "64 numbers, standardised (phi_s)" in (first / "log.txt").read_text()
    ((_, header), _) = load_students(first).values()
    assert header["embedding_dim"] == 64


@pytest.mark.parametrize("kind", ["other", "infinite", "pickle", "folder"])
def test_a_cached_reduction_that_cannot_be_right_is_fitted_anew(
    kind: str, home: Path, logged: list[str]
) -> None:
    config = compose("distill", [*DISTILL, "teacher.reduce=pca", "teacher.embedding_dim=6"])
    teacher, source = build_teacher(config.teacher, ""), load_source(config.data, "train")
    fitted = cached_reduction(teacher, config, source)
    (file,) = (home / "cache" / "reductions").iterdir()
    if kind == "other":
        save_file({"mean": torch.zeros(3)}, file)
    elif kind == "infinite":
        save_file({**fitted, "mean": fitted["mean"] / 0}, file)
    elif kind == "pickle":
        torch.save({"mean": Path("x")}, file)
    else:
        file.unlink()
        file.mkdir()
    again = cached_reduction(teacher, config, source)
    assert all(torch.equal(again[key], fitted[key]) for key in fitted)
    assert [line for line in logged if f"{file} is damaged (" in line and "made anew" in line]
    # A folder cannot be replaced; the run goes on, as on a disk that can only be read.
    assert file.is_dir() == any("not kept for other runs" in line for line in logged)


def test_embeddings_of_another_reduction_are_kept_beside_each_other(home: Path) -> None:
    options = ["teacher.reduce=pca", "teacher.embedding_dim=6", "teacher_cache=embeddings"]
    run(*options, "run_dir=one")
    (file,) = (home / "cache" / "reductions").iterdir()
    before = file.read_bytes()
    file.write_bytes(before[:-9])
    run(*options, "run_dir=two")
    assert file.read_bytes() == before  # fitted anew to the same bits
    tensors = load_file(file)
    save_file({**tensors, "mean": tensors["mean"] + 1e-6}, file)
    assert len(list((home / "embeddings").iterdir())) == 1
    run(*options, "run_dir=three")
    assert len(list((home / "embeddings").iterdir())) == 2


def test_a_cache_that_cannot_be_is_refused_before_a_reduction_is_fitted(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["teacher.reduce=pca", "teacher.embedding_dim=6"]
    (home / "notes").write_text("mine")
    with pytest.raises(ValueError, match="teacher_cache=notes is a file; give a folder"):
        run(*options, "teacher_cache=notes", "run_dir=one")
    nothing = shutil._ntuple_diskusage(1000, 1000, 0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: nothing)
    with pytest.raises(ValueError, match=r"teacher_cache=embeddings would need .* 6 floats"):
        run(*options, "teacher_cache=embeddings", "run_dir=two")
    assert not (home / "cache" / "reductions").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["teacher.reduce=pca", "teacher.embedding_dim=65"],
            "teacher.embedding_dim=65 exceeds the 64 numbers",
        ),
        (["teacher.reduce=pca"], "teacher.embedding_dim=128 exceeds the 64 numbers"),
        (
            ["teacher.reduce=pca", "teacher.embedding_dim=30", "teacher.num_reduce_images=30"],
            "vary in fewer than 30 directions",
        ),
        (["teacher.embedding_dim=6"], "teacher.embedding_dim=6 needs teacher.reduce"),
        (
            ["teacher.reduce=phi_s", "teacher.embedding_dim=6"],
            "teacher.embedding_dim=6 is for teacher.reduce=pca or whiten; phi_s keeps",
        ),
        (
            ["teacher.reduce=pca", "teacher.embedding_dim=0"],
            "embedding_dim must be null or at least 1, got 0",
        ),
        (
            ["teacher.reduce=pca", "teacher.num_reduce_images=1"],
            "num_reduce_images must be at least 2, got 1",
        ),
        (
            ["teacher=swav_r50", "teacher.name=test_vit"],
            "teacher.name=test_vit is only for teacher=timm",
        ),
    ],
)
def test_a_reduction_that_cannot_be_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        run(*options, "steps=1")


def test_a_teacher_cache_of_a_vit_gives_what_the_vit_gives() -> None:
    uncached = run("run_dir=uncached")
    for name in ("filling", "cached"):
        assert_same_students(uncached, run(f"run_dir={name}", "teacher_cache=embeddings"))
    run(
        "run_dir=other", "teacher_cache=embeddings", "teacher.reduce=pca", "teacher.embedding_dim=6"
    )
    assert len(list(Path("embeddings").iterdir())) == 2


def test_a_vit_can_be_planned_without_its_weights() -> None:
    options = [
        *DISTILL,
        "teacher.checkpoint=nowhere",
        "teacher.reduce=pca",
        "teacher.embedding_dim=6",
        "teacher_cache=c",
    ]
    (row,) = tools_plan.plan("distill", options, **PLAN).jobs
    assert row.teacher_cache == 3 * 8 * 4 * (
        1 + 6 * 3
    )  # steps x images x bytes x (checksum + numbers of three views)


def test_a_student_that_seed_released_is_evaluated_as_it_is(home: Path) -> None:
    torch.manual_seed(0)
    config = compose("distill", ["student=resnet18"]).students["resnet18"]
    student = build_student(config, 128)
    tensors = {
        f"module.student.{key}": tensor for key, tensor in student.encoder.state_dict().items()
    }
    tensors |= {
        f"module.student.fc.{key}": tensor for key, tensor in student.head.state_dict().items()
    }
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": tensors}, "seed_r18.pth.tar")
    for split in ("train", "val"):
        for label, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
            (home / "images" / split / label).mkdir(parents=True)
            for number in range(2):
                shade = tuple(max(0, value - 20 * number) for value in colour)
                Image.new("RGB", (32, 32), shade).save(
                    home / "images" / split / label / f"{number}.png"
                )
    options = [
        "run=seed_r18.pth.tar",
        "data=image_folder",
        "data.root=images",
        "data.num_workers=0",
        "ks=[1]",
        "device=cpu",
    ]
    (results,) = knn.knn(compose("knn", options)).values()
    assert results["knn1_majority"] == 100
    (file,) = (home / "results").iterdir()
    (record,) = json.loads(file.read_text())["protocol"]["students"].values()
    assert (record["network"], record["command"], record["sha256"]) == (
        "resnet18",
        "released by SEED",
        file_hash(home / "seed_r18.pth.tar"),
    )


@pytest.mark.slow
def test_a_vit_14_sees_224_and_96_and_teaches_real_students(home: Path) -> None:
    save_vit("vit_small_patch14_dinov2", home / "large.safetensors")
    students = [
        "student=[resnet18,mobilenetv3_large]",
        "views=swav_multicrop",
        "views.crops.local.num=2",
        "steps=2",
    ]
    network = [
        "teacher=timm",
        "teacher.name=vit_small_patch14_dinov2.lvd142m",
        "teacher.checkpoint=large.safetensors",
        "objective=seed",
    ]
    folder = distill.distill(
        compose("distill", [*network, *students, *DATA, "batch_size=4", "log_every=1"])
    )
    for name, (student, header) in load_students(folder).items():
        assert header["embedding_dim"] == 384
        assert all(0 < row[f"{name}/loss"] < 100 for row in metrics(folder))
        assert student.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 384)
