"""The dense term: its loss against loops, its targets, and the walk with it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import timm
import tiny
import torch
from torch import Tensor, nn

from seed_exp.config.schema import (
    CropConfig,
    L2Config,
    ObjectiveConfig,
    SeedConfig,
    StudentConfig,
)
from seed_exp.methods.dense import DenseTerm, dense_loss, dense_term, refuse_dense_cache
from seed_exp.methods.seed import Seed
from seed_exp.models.frozen_teacher import Teacher
from seed_exp.models.students import Student, build_student, load_students, save_student

BATCH = tiny.host_batch(5)
GRIDS = [((2, 2), (5, 5)), ((4, 4), (4, 4)), ((6, 6), (4, 4)), ((1, 1), (3, 3)), ((2, 3), (4, 6))]


def random_maps(grid: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(3, 5, *grid, generator=generator)


def views(num_images: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "global": torch.randn(2, num_images, 3, 8, 8, generator=generator),
        "local": torch.randn(3, num_images, 3, 6, 6, generator=generator),
    }


def build(
    names: tuple[str, ...] = ("a",),
    config: ObjectiveConfig | None = None,
    *,
    bn: bool = True,
    dropout: float = 0.0,
) -> Seed:
    """A method with the dense term; the students called b are wider than the others."""
    config = config or SeedConfig(tau_teacher=0.05, queue_size=21, dense_weight=0.5)
    students = tiny.students(names, bn=bn, dropout=dropout)
    if "b" in students:
        torch.manual_seed(2)
        students["b"] = Student(tiny.Encoder(9, bn=bn, dropout=dropout), None, tiny.DIM)
    teacher = tiny.teacher()
    term = dense_term(config, students, teacher, tiny.views_config(), seed=4)
    if term is not None:
        generator = torch.Generator().manual_seed(3)
        term.mean.copy_(torch.randn(8, generator=generator))
        term.factor.copy_(0.5 + torch.rand(8, generator=generator))
    return Seed(students, teacher, config, ["global", "local"], seed=3, dense=term)


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "theirs"), GRIDS)
def test_loss_and_gradient_equal_the_loops(own: tuple[int, int], theirs: tuple[int, int]) -> None:
    student, teacher = random_maps(own, 0).requires_grad_(), random_maps(theirs, 1).requires_grad_()
    slow = student.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = dense_loss(student, teacher)
    expected = reference.dense_loss(slow, teacher.detach())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    value.backward()
    expected.backward()
    torch.testing.assert_close(student.grad.double(), slow.grad, rtol=1e-4, atol=1e-6)
    assert teacher.grad is None


def test_equal_maps_have_no_loss_and_others_of_width_or_number_are_refused() -> None:
    maps = random_maps((3, 3), 0)
    assert dense_loss(maps, maps).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"student \[3, 5, 3, 3\], teacher \[3, 4, 3, 3\]"):
        dense_loss(maps, maps[:, :4])


# --- the walk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, L2Config(queue_size=21, dense_weight=0.5)])
def test_each_resolution_adds_the_loss_of_its_maps_for_each_student(
    config: ObjectiveConfig | None,
) -> None:
    method, batch = build(("a", "b"), config, bn=False), views()
    without = build(("a", "b"), tiny.replaced(method.config, dense_weight=0), bn=False)
    prepared = method.prepare(batch, BATCH)
    term, encoder = method.dense, method.teacher.encoder
    assert isinstance(term, DenseTerm)
    for name, student in method.trainable.items():
        out = method.loss(name, student, prepared)
        plain = without.loss(name, without.trainable[name], without.prepare(batch, BATCH))
        parts = []
        for resolution, images in batch.items():
            flat = images.flatten(0, 1)
            maps = encoder.layers(flat)
            target = (maps - term.mean.view(1, 8, 1, 1)) * term.factor.view(1, 8, 1, 1)
            own = student.encoder.layers(flat)
            weight = student.map_head.weight[:, :, 0, 0]
            predicted = torch.einsum("nchw,dc->ndhw", own, weight)
            predicted = predicted + student.map_head.bias.view(1, -1, 1, 1)
            parts.append(0.5 * reference.dense_loss(predicted.detach(), target))
            found = out[f"loss_dense_{resolution}"].item()
            assert found == pytest.approx(parts[-1].item(), rel=1e-5)
            assert torch.equal(out[f"loss_{resolution}"], plain[f"loss_{resolution}"])
        expected = plain["loss"].item() + sum(parts).item()
        assert out["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_weight_0_is_no_dense_term_and_draws_no_random_number() -> None:
    config = SeedConfig(queue_size=21)
    students, plain = tiny.students(), tiny.students()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert dense_term(config, students, tiny.teacher(), tiny.views_config(), seed=4) is None
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)
    tiny.assert_same(students["a"].state_dict(), plain["a"].state_dict())
    dense = tiny.replaced(config, dense_weight=1.0)
    teacher = tiny.teacher()
    torch.manual_seed(1)
    dense_term(dense, students, teacher, tiny.views_config(), seed=4)
    assert torch.equal(torch.get_rng_state(), before), "and with it nothing else starts elsewhere"
    heads = {"map_head.weight", "map_head.bias"}
    assert students["a"].state_dict().keys() - plain["a"].state_dict().keys() == heads


def test_a_run_interrupted_by_its_data_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight, broken, resumed = (build(("a", "b"), dropout=0.3) for _ in range(3))
    assert isinstance(resumed.dense, DenseTerm)
    resumed.dense.mean.zero_()  # its checkpoint has what was fitted
    tiny.train(straight, tmp_path / "straight", ema_decay=0.9)
    source = tiny.Images(fail_after=8 * 9 + 3)
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(broken, tmp_path / "broken", source=source, ema_decay=0.9)
    tiny.train(resumed, tmp_path / "broken", ema_decay=0.9)
    one, two = (tiny.last_checkpoint(tmp_path / name) for name in ("straight", "broken"))
    tiny.assert_same(one, two)
    assert {"dense.mean", "dense.factor"} <= one["carried"].keys()
    assert "map_head.weight" in one["networks"]["b"]
    line = (tmp_path / "straight/metrics.jsonl").read_text().splitlines()[0]
    assert {"a/loss_dense_global", "b/loss_dense_local"} <= json.loads(line).keys()


def test_a_student_of_a_fleet_becomes_what_it_becomes_alone(tmp_path: Path) -> None:
    fleet, alone = build(("b", "a")), build(("a",))
    for method, folder in ((fleet, "fleet"), (alone, "alone")):
        tiny.train(method, tmp_path / folder, tiny.fit_config(steps=5, eval_every=0))
    tiny.assert_same(tiny.weights(fleet)["a"], tiny.weights(alone)["a"])


def test_a_students_file_has_no_map_head(tmp_path: Path) -> None:
    config = StudentConfig("convnet_w2")
    student = build_student(config, tiny.DIM)
    student.add_map_head(16, 8)
    save_student(tmp_path / "a.safetensors", student, config, {"eval_views": {}})
    ((loaded, _),) = load_students(tmp_path / "a.safetensors").values()
    assert loaded.map_head is None
    tiny.assert_same(loaded.encoder.state_dict(), student.encoder.state_dict())


# --- which networks -------------------------------------------------------------------------------


def timm_network(name: str, **options: Any) -> nn.Module:
    options = {"dynamic_img_size": True, **options} if "vit" in name else options
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, num_classes=0, **options)
    network.num_features = network.head_hidden_size
    return network


def crops(**sizes: int) -> Any:
    return tiny.views_config(
        crops={name: CropConfig(size, 1, [0.5, 1.0]) for name, size in sizes.items()}
    )


def teacher_of(network: nn.Module) -> Teacher:
    return Teacher(network, nn.Identity(), int(network.num_features))


@pytest.mark.parametrize("theirs", ["test_vit", "test_efficientnet"])
@pytest.mark.parametrize("own", ["test_vit", "test_efficientnet", "mobilenetv3_small_050"])
def test_convolutional_networks_and_transformers_learn_each_others_maps(
    own: str, theirs: str
) -> None:
    config = SeedConfig(queue_size=8, dense_weight=1.0, tau_teacher=0.1)
    teacher = teacher_of(timm_network(theirs))
    students = {"a": Student(timm_network(own), None, teacher.embedding_dim)}
    recipe = crops(**{"global": 64, "local": 48})
    term = dense_term(config, students, teacher, recipe, seed=0)
    method = Seed(students, teacher, config, ["global", "local"], seed=0, dense=term)
    batch = {"global": torch.randn(1, 2, 3, 64, 64), "local": torch.randn(1, 2, 3, 48, 48)}
    out = method.loss("a", students["a"], method.prepare(batch, tiny.host_batch(2)))
    out["loss"].backward()
    assert all(out[f"loss_dense_{name}"] > 0 for name in batch)
    assert all(parameter.grad is not None for parameter in students["a"].parameters())
    both = teacher.with_maps(batch["global"][0])
    torch.testing.assert_close(both[0], teacher(batch["global"][0]))


class Pooled(nn.Module):
    """A network that keeps its maps to itself."""

    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class Wide(tiny.Encoder):
    def forward_features(self, images: Tensor) -> Tensor:
        return super().forward_features(images)[:, :, ::2]


def test_networks_whose_maps_cannot_be_compared_are_refused() -> None:
    config, recipe = SeedConfig(dense_weight=1.0), tiny.views_config()

    def refused(student: nn.Module, teacher: Teacher, recipe: Any, message: str) -> None:
        students = {"a": Student(student, None, tiny.DIM)}
        with pytest.raises(ValueError, match=message):
            dense_term(config, students, teacher, recipe, seed=0)

    good, teacher = tiny.Encoder(6, bn=True), tiny.teacher()
    refused(Pooled(), teacher, recipe, r"students\.a has no spatial map to compare: Pooled")
    refused(good, teacher_of(Pooled()), recipe, "the teacher has no spatial map to compare")
    refused(Wide(6, bn=True), teacher, recipe, r"students\.a \(\d x \d\) cannot be aligned")
    small = crops(**{"global": 32})
    network = timm_network("mobilenetv3_small_050")
    refused(network, teacher, small, r"students\.a has a map of a single position .* 32 x 32")
    refused(good, teacher_of(network), small, "the teacher has a map of a single position")
    padded = timm_network("test_vit", dynamic_img_pad=True)
    refused(
        padded, teacher, crops(**{"global": 72}), "pads images of 72 pixels .* cannot be aligned"
    )
    with pytest.raises(ValueError, match=r"objective\.dense_weight .* got -1"):
        SeedConfig(dense_weight=-1)


def test_a_cache_for_maps_is_refused_with_the_size_it_would_need() -> None:
    options = {"views": tiny.views_config(), "teacher_cache": "kept"}
    config: Any = SimpleNamespace(objective=SeedConfig(dense_weight=1.0), **options)
    # Two global views of 3 x 3 positions and three local ones of 2 x 2, 8 channels of 2 bytes.
    needed = (2 * 9 + 3 * 4) * 8
    with pytest.raises(ValueError, match=rf"{needed * 2 * 1e6 / 1e9:.3g} GB .* {needed} numbers"):
        refuse_dense_cache(config, tiny.teacher(), 1_000_000)
    config.objective = SeedConfig()
    refuse_dense_cache(config, tiny.teacher(), 1_000_000)
