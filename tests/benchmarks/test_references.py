from __future__ import annotations

import base64
import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from seed_exp.benchmarks.references import (
    PlainTraining,
    PlainTsv,
    PlainViews,
    dali_views,
    kornia_views,
    plain_loss,
)
from seed_exp.config.schema import CropConfig, SeedConfig, ViewsConfig
from seed_exp.data.tsv import TsvSource
from seed_exp.views.recipe import TrainViews

CPU = torch.device("cpu")


def unit(num: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(num, 5, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("tau_teacher", [0.01, 0.2])
def test_the_plain_loss_is_the_formula(tau_teacher: float) -> None:
    student, teacher, queue = unit(6, 1), unit(6, 2), unit(9, 3)
    found = plain_loss(student, teacher, queue, tau_student=0.2, tau_teacher=tau_teacher)
    assert found.item() == pytest.approx(
        reference.seed_loss(student, teacher, queue, 0.2, tau_teacher), rel=1e-5
    )


def test_the_plain_loss_does_not_mind_what_becomes_of_the_queue_before_the_backward_pass() -> None:
    gradients = []
    for enqueue in (False, True):
        student, queue = unit(6, 1).requires_grad_(), unit(9, 3)
        loss = plain_loss(student, unit(6, 2), queue, tau_student=0.2, tau_teacher=0.1)
        if enqueue:
            queue[:6] = unit(6, 4)
        gradients += torch.autograd.grad(loss, student)
    assert torch.equal(*gradients)


def photograph(size: int = 24) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(pixels)


def views_config(num: int = 1, **changes: Any) -> ViewsConfig:
    crops = {"global": CropConfig(24, num, [1.0, 1.0]), "local": CropConfig(8, 0)}
    return ViewsConfig(
        "test",
        crops,
        aspect_ratio=[1.0, 1.0],
        **{"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], **changes},
    )


def test_plain_views_have_the_shapes_of_ours() -> None:
    config = tiny.views_config(jitter_prob=1.0, grayscale_prob=0.5, blur_prob=0.5)
    images = [photograph(10), photograph(12)]
    plain = PlainViews(config)(images)
    views = TrainViews(config, seed=0)
    batch = views.empty(2)
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    views.host(tensors, np.full(2, -1), 0, np.arange(2), batch)
    ours = views.device(batch)
    assert {name: (view.shape, view.dtype) for name, view in plain.items()} == {
        name: (view.shape, view.dtype) for name, view in ours.items()
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"flip_prob": 1.0}, {"grayscale_prob": 1.0}, {"grayscale_prob": 1.0, "flip_prob": 1.0}],
)
def test_without_chance_plain_views_have_the_pixels_of_ours(changes: dict[str, float]) -> None:
    config = views_config(**changes)
    views = TrainViews(config, seed=0)
    batch = views.empty(1)
    views.host(
        [torch.from_numpy(np.array(photograph())).permute(2, 0, 1)],
        np.full(1, -1),
        0,
        np.arange(1),
        batch,
    )
    (plain, ours) = (
        made["global"] for made in (PlainViews(config)([photograph()]), views.device(batch))
    )
    assert (plain - ours).abs().max() < 1.5 / 255 / min(
        config.std
    )  # Pillow rounds the luminance to a grey level


@pytest.mark.parametrize(
    "changes",
    [
        {"jitter": [0.4, 0.4, 0.4, 0.1], "jitter_prob": 1.0},
        {"blur_prob": 1.0, "blur_sigma": [1.0, 2.0]},
    ],
)
def test_plain_views_differ_from_view_to_view(changes: dict[str, Any]) -> None:
    first, second = PlainViews(views_config(2, **changes))([photograph()])["global"]
    assert not torch.equal(first, second)


def test_blur_smooths() -> None:
    never, always = (views_config(blur_prob=prob, blur_sigma=[1.0, 1.0]) for prob in (0.0, 1.0))
    assert (
        PlainViews(always)([photograph()])["global"].std()
        < 0.5 * PlainViews(never)([photograph()])["global"].std()
    )


@pytest.mark.parametrize("grayscale_first", [True, False])
def test_grayscale_and_jitter_come_in_the_order_of_the_recipe(grayscale_first: bool) -> None:
    # To turn the hue changes nothing in a view that is grey already, and its luminance before that.
    turned = views_config(
        jitter=[0.0, 0.0, 0.0, 0.5],
        jitter_prob=1.0,
        grayscale_prob=1.0,
        grayscale_first=grayscale_first,
    )
    grey = PlainViews(views_config(grayscale_prob=1.0))([photograph()])["global"]
    assert torch.equal(PlainViews(turned)([photograph()])["global"], grey) == grayscale_first


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    """Five images of different sizes."""
    lines = []
    for index in range(5):
        file = io.BytesIO()
        photograph(12 + index).save(file, "PNG")
        lines.append(f"image{index}\t{index}\t{base64.b64encode(file.getvalue()).decode()}\n")
    path = tmp_path / "images.tsv"
    path.write_text("".join(lines))
    return path


def test_the_plain_reader_finds_the_images_of_ours(tsv: Path) -> None:
    plain, ours = PlainTsv(tsv, 4), TsvSource(tsv)
    for index in (3, 0, 2):
        assert torch.equal(
            torch.from_numpy(np.array(plain.image(index))).permute(2, 0, 1), ours.image(index)
        )


def test_a_plain_step_is_one_of_ours() -> None:
    views = TrainViews(tiny.views_config(), seed=0)
    batch = views.empty(3)
    views.host(
        [tiny.Images().image(index) for index in range(3)], np.full(3, -1), 0, np.arange(3), batch
    )
    method, optimizer = tiny.seed(queue_size=8), tiny.optimizer_config(lr=0.1)
    plain = PlainTraining(
        tiny.students()["a"], tiny.teacher(), method.config, optimizer, ["global", "local"], CPU
    )
    for name, queue in method.queues.items():
        plain.queues[name].copy_(queue.embeddings)
    student = method.trainable["a"]
    sgd = torch.optim.SGD(
        student.parameters(),
        lr=0.1,
        momentum=optimizer.momentum,
        weight_decay=optimizer.weight_decay,
    )

    for _ in range(3):  # the queue of 8 is full after the third
        made = views.device(batch)
        plain.step(made)
        method.loss("a", student, method.prepare(made, batch))["loss"].backward()
        sgd.step()
        sgd.zero_grad()
        method.after_step()

    for name, queue in method.queues.items():
        torch.testing.assert_close(plain.queues[name], queue.embeddings)
    torch.testing.assert_close(
        dict(plain.student.state_dict()), dict(student.state_dict()), rtol=1e-4, atol=1e-6
    )
    assert not torch.equal(tiny.students()["a"].head[0].weight, student.head[0].weight)


def test_plain_training_leaves_the_networks_it_is_given_alone() -> None:
    student, teacher = tiny.students()["a"], tiny.teacher()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    training = PlainTraining(
        student,
        teacher,
        SeedConfig(queue_size=8),
        tiny.optimizer_config(),
        ["global"],
        CPU,
    )
    training.step({"global": torch.rand(1, 4, 3, 8, 8)})
    tiny.assert_same(before[0], student.state_dict())
    tiny.assert_same(before[1], teacher.state_dict())
    assert not torch.equal(training.student.head[0].weight, student.head[0].weight)


@pytest.mark.parametrize(
    ("library", "build"),
    [("kornia", kornia_views), ("nvidia.dali", lambda config: dali_views(config, 2))],
)
def test_a_library_that_is_not_installed_is_left_out(
    monkeypatch: pytest.MonkeyPatch, library: str, build: Callable[[ViewsConfig], Any]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert build(views_config()) is None


def test_kornia_makes_normalised_views() -> None:
    pytest.importorskip("kornia")
    run = kornia_views(views_config(grayscale_prob=1.0))
    assert run is not None
    made = run(torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8))
    assert (made.shape, made.dtype) == ((4, 3, 24, 24), torch.float32)
    grey = made * torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1) + torch.tensor([0.4, 0.5, 0.6]).view(
        3, 1, 1
    )
    torch.testing.assert_close(grey[:, 0], grey[:, 2])


def test_dali_makes_the_plain_views(tsv: Path) -> None:
    pytest.importorskip("nvidia.dali")
    config = views_config(2, flip_prob=1.0)
    run = dali_views(config, 2)
    assert run is not None
    reader = PlainTsv(tsv, 2)
    for _ in range(2):
        made = run([reader.data(0), reader.data(1)])["global"]
        plain = PlainViews(config)([reader.image(0), reader.image(1)])["global"]
        assert made.shape == plain.shape
        assert (made - plain).abs().max() < 3 / 255 / min(config.std)
