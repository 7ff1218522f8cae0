"""Every objective against its formula, and in the walk that all share.

Fleets, multi-crop, resume, ranks.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import forks
import pytest
import reference
import tiny
import torch
from ranks import Ranks
from torch import Tensor
from torch.nn import functional as F

from seed_exp.config.compose import compose
from seed_exp.config.schema import OBJECTIVE_CONFIGS, ObjectiveConfig, TeacherStatistics
from seed_exp.engine.distributed import rank
from seed_exp.methods import clustering, losses, streaming
from seed_exp.methods.bags import BagSeed, any_bags, needs_bags
from seed_exp.methods.objectives import OBJECTIVES
from seed_exp.methods.seed import Seed
from seed_exp.models.heads import head_layers, projection_head
from seed_exp.models.reduction import Reduction
from seed_exp.training.distillation import distill
from seed_exp.training.encoders import build_students

BATCH = tiny.host_batch(5)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

FORMULAS: dict[str, tuple[Loss, Loss]] = {
    "compress": (
        lambda s, t, d: losses.compress_loss(
            s, losses.compress_target(t, d, temperature=0.1), d, temperature=0.1
        ),
        lambda s, t, d: reference.compress_loss(s, t, d, 0.1),
    ),
    "bingo": (
        lambda s, t, d: losses.bingo_loss(
            s, t, losses.bingo_target(t, d, bag_size=4, weight=0.3), d, temperature=0.2
        ),
        lambda s, t, d: reference.bingo_loss(s, t, d, 0.2, 4, 0.3),
    ),
    "bingo, bag of the whole queue": (
        lambda s, t, d: losses.bingo_loss(
            s, t, losses.bingo_target(t, d, bag_size=99, weight=1), d, temperature=0.2
        ),
        lambda s, t, d: reference.bingo_loss(s, t, d, 0.2, 99, 1),
    ),
    "binary_contrastive": (
        lambda s, t, d: losses.binary_contrastive_loss(s, t, d, temperature=0.07),
        lambda s, t, d: reference.binary_contrastive_loss(s, t, d, 0.07),
    ),
    "bag_loss": (
        lambda s, t, d: losses.bag_loss(
            s, t, t.roll(1, 0), d, own_share=torch.linspace(0, 1, len(s)), temperature=0.2
        ),
        lambda s, t, d: reference.bag_loss(
            s, t, t.roll(1, 0), d, torch.linspace(0, 1, len(s)).tolist(), 0.2
        ),
    ),
    "squared_distance": (
        lambda s, t, _: losses.squared_distance(s, t),
        lambda s, t, _: reference.squared_distance(s, t),
    ),
    "regression": (
        lambda s, t, _: losses.regression_loss(3 * s, 5 * t, smooth_share=0.3),
        lambda s, t, _: reference.regression_loss(3 * s, 5 * t, 0.3),
    ),
    "coss": (
        lambda s, t, _: losses.coss_loss(s, t, weight=0.7),
        lambda s, t, _: reference.coss_loss(s, t, 0.7),
    ),
}


# --- the losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient_equal_the_formula(
    name: str, batch: tuple[Tensor, Tensor, Tensor], chunk: None
) -> None:
    ours, theirs = (tensor.clone().requires_grad_() for tensor in (batch[0], batch[0].double()))
    loss, formula = FORMULAS[name]
    value, expected = loss(ours, *batch[1:]), formula(theirs, *batch[1:])
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(
        ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5 * float(theirs.grad.abs().max())
    )


@pytest.mark.parametrize("name", FORMULAS)
def test_autocast_changes_nothing(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    loss, _ = FORMULAS[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(*batch)
    assert inside.dtype == torch.float32
    assert inside.item() == loss(*batch).item()


@pytest.mark.parametrize("name", FORMULAS)
def test_only_the_student_gets_a_gradient(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, queue = (tensor.clone().requires_grad_() for tensor in batch)
    FORMULAS[name][0](student, teacher, queue).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert queue.grad is None


@pytest.mark.parametrize("name", ["compress", "bingo", "bag_loss", "binary_contrastive"])
def test_no_loss_holds_the_similarity_matrix(name: str) -> None:
    student, teacher, queue = (
        tiny.embeddings(64, 8, 0).requires_grad_(),
        tiny.embeddings(64, 8, 1),
        tiny.embeddings(65536, 8, 2),
    )
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        FORMULAS[name][0](student, teacher, queue).backward()
    assert largest <= streaming.CHUNK_ELEMENTS["cpu"] < 64 * 65536


def test_the_ranges_of_the_losses_are_those_of_the_docstrings() -> None:
    one = tiny.embeddings(40, 16, 0)
    assert losses.squared_distance(one, one).item() == 0
    assert losses.squared_distance(-one, one).item() == pytest.approx(4)
    assert losses.coss_loss(one, one, weight=0.5).item() == pytest.approx(-1.5)
    assert losses.coss_loss(-one, one, weight=0.5).item() == pytest.approx(1.5)
    apart = torch.eye(16)[:4], torch.eye(16)[4:8], torch.eye(16)[8:]
    expected = (1 + torch.tensor(8.0)).log() + 8 * (1 + torch.tensor(1 / 8)).log()
    assert losses.binary_contrastive_loss(*apart, temperature=0.1).item() == pytest.approx(
        expected.item()
    )


def test_bad_arguments_are_named() -> None:
    good = tiny.embeddings(3, 8, 0)
    with pytest.raises(ValueError, match=r"student \[3, 8\], teacher \[2, 8\]"):
        losses.squared_distance(good, good[:2])
    with pytest.raises(ValueError, match=r"student \[3, 8\], teacher \[3, 4\]"):
        losses.coss_loss(good, good[:, :4], weight=1)
    with pytest.raises(ValueError, match=r"queue \[3, 4\]"):
        losses.binary_contrastive_loss(good, good, good[:, :4], temperature=1)
    with pytest.raises(ValueError, match="got temperature=0"):
        losses.compress_target(good, good, temperature=0)
    with pytest.raises(ValueError, match=r"weight must be from 0 to 1, got 1\.5"):
        losses.bingo_target(good, good, bag_size=2, weight=1.5)


# --- clusters -------------------------------------------------------------------------------------


def test_k_means_equals_the_algorithm_written_out(chunk: None) -> None:
    points, start = tiny.embeddings(60, 6, 0), tiny.embeddings(7, 6, 1)
    for iterations in (1, 2, 5):
        expected = reference.k_means(points, start, iterations)
        torch.testing.assert_close(
            clustering.k_means(points, start, iterations).double(), expected, rtol=1e-5, atol=1e-5
        )


def test_centroids_that_lost_their_points_move_to_the_strangest_ones() -> None:
    points = tiny.embeddings(30, 4, 0)
    start = torch.cat([points[:2], -F.normalize(points.mean(0), dim=0).expand(3, -1)])
    found = clustering.k_means(points, start, 1)
    torch.testing.assert_close(
        found.double(), reference.k_means(points, start, 1), rtol=1e-5, atol=1e-5
    )
    assert len({tuple(row) for row in found.tolist()}) == 5


@pytest.mark.parametrize("epsilon", [0.5, 0.05])
def test_assignments_are_those_of_sinkhorn_and_knopp(epsilon: float, chunk: None) -> None:
    points, prototypes = tiny.embeddings(40, 6, 0), tiny.embeddings(5, 6, 1)
    expected = reference.sinkhorn(points, prototypes, epsilon, 3)
    weights = clustering.balancing_weights(points, prototypes, epsilon, 3)
    codes = (points @ prototypes.T / epsilon + weights).softmax(1)
    torch.testing.assert_close(codes.double(), expected, rtol=1e-3, atol=1e-5)
    mean = clustering.mean_prototype(points, prototypes, weights, epsilon)
    torch.testing.assert_close(mean.double(), expected @ prototypes.double(), rtol=1e-3, atol=1e-5)
    balanced = clustering.balancing_weights(points, prototypes, epsilon, 200)
    usage = (points @ prototypes.T / epsilon + balanced).softmax(1).mean(0)
    torch.testing.assert_close(usage, torch.full((5,), 0.2), rtol=1e-3, atol=1e-3)


def test_clusters_are_predicted_as_by_the_formula() -> None:
    teacher, prototypes = tiny.embeddings(5, 6, 0), tiny.embeddings(4, 6, 1)
    ours, theirs = (
        tensor.clone().requires_grad_()
        for tensor in (tiny.embeddings(5, 6, 2), tiny.embeddings(5, 6, 2).double())
    )
    nearest = [[float(c == int((t @ prototypes.T).argmax())) for c in range(4)] for t in teacher]
    target = clustering.nearest_centroid(teacher, prototypes)
    loss, expected = (
        losses.compress_loss(ours, target, prototypes, temperature=0.1),
        reference.cluster_loss(theirs, nearest, prototypes, 0.1),
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_more_clusters_than_the_queue_has_entries_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_clusters=22 exceeds objective\.queue_size=21"):
        build("k_means", num_clusters=22)


# --- the walk that all take -----------------------------------------------------------------------


def build(
    name: str,
    names: tuple[str, ...] = ("a",),
    *,
    bn: bool = True,
    dropout: float = 0.0,
    **options: float,
) -> Seed:
    values = {
        "queue_size": 21,
        "tau_student": 0.2,
        "tau_teacher": 0.05,
        "effective_neighbours": None,
        "num_clusters": 6,
        "cluster_every": 3,
        "momentum": 0.9,
        "weight": 0.5,
        **options,
    }
    schema = OBJECTIVE_CONFIGS[name]
    config = schema(**{key: values[key] for key in options_of(schema) & values.keys()})
    return seed_method(config, names, bn=bn, dropout=dropout)


def options_of(schema: type[ObjectiveConfig]) -> set[str]:
    return {field.name for field in fields(schema)}


def seed_method(
    config: ObjectiveConfig,
    names: tuple[str, ...] = ("a",),
    *,
    bn: bool = True,
    dropout: float = 0.0,
) -> Seed:
    students = tiny.students(names, bn=bn, dropout=dropout)
    if needs_bags(config):
        bags = any_bags(40, 3)
        return BagSeed(students, tiny.teacher(), config, ["global"], seed=3, bags=bags)
    return Seed(students, tiny.teacher(), config, ["global", "local"], seed=3)


def prepared_by(method: Seed) -> Any:
    """The targets of a batch of five images, or of five pairs, which all students share."""
    num = 5 * method.rows_per_image
    return method.prepare(views(num), tiny.host_batch(num))


def views(num_images: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "global": torch.randn(2, num_images, 3, 8, 8, generator=generator),
        "local": torch.randn(3, num_images, 3, 6, 6, generator=generator),
    }


def seed_formula(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
    return reference.seed_loss_matrix(student, teacher, queue, 0.2, 0.05)


def info_nce(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
    return reference.seed_loss_matrix(student, teacher, queue, 0.2, 1e-6)


OF_EMBEDDINGS: dict[str, Loss] = {
    "seed": seed_formula,
    "infonce": info_nce,
    "l2": lambda s, t, _: reference.squared_distance(s, t),
    "simreg": lambda s, t, _: reference.squared_distance(s, t),
    "coss": lambda s, t, _: reference.coss_loss(s, t, 0.5),
    "compress": lambda s, t, d: reference.compress_loss(s, t, d, 0.2),
    "binary_contrastive": lambda s, t, d: reference.binary_contrastive_loss(s, t, d, 0.2),
    "bingo": lambda s, t, d: reference.bingo_loss(s, t, d, 0.2, 5, 0.5),
    "k_means": lambda s, t, c: reference.cluster_loss(
        s, [[float(j == (t @ c.T).argmax(1)[i]) for j in range(6)] for i in range(len(t))], c, 0.2
    ),
}


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_the_objective_named_in_the_options_is_minimised_in_every_resolution(name: str) -> None:
    method, batch = build(name, bn=False), views()
    student = method.trainable["a"]
    out = method.loss("a", student, method.prepare(batch, BATCH))
    for resolution, images in batch.items():
        flat = images.flatten(0, 1)
        memory = (
            method.clusters[resolution].prototypes
            if method.clusters
            else method.queues[resolution].embeddings
        )
        expected = OF_EMBEDDINGS[name](student(flat), method.teacher(flat), memory)
        assert out[f"loss_{resolution}"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert out["loss"].item() == pytest.approx((out["loss_global"] + out["loss_local"]).item())


def test_online_clusters_are_balanced_over_the_queue_after_every_step() -> None:
    method, batch = build("online_clustering", bn=False), views()
    for _ in range(6):
        method.prepare(batch, BATCH)
        method.after_step()
    clusters, queue = method.clusters["global"], method.queues["global"].embeddings
    codes = reference.sinkhorn(queue, clusters.prototypes, 0.05, 3)
    torch.testing.assert_close(
        clusters.target(queue).double(), codes @ clusters.prototypes.double(), rtol=1e-3, atol=1e-4
    )
    student, prepared = method.trainable["a"], method.prepare(batch, BATCH)
    flat = batch["global"].flatten(0, 1)
    logits = method.teacher(flat) @ clusters.prototypes.T / 0.05 + clusters.weights
    expected = reference.cluster_loss(
        student(flat), logits.double().softmax(1).tolist(), clusters.prototypes, 0.2
    )
    assert method.loss("a", student, prepared)["loss_global"].item() == pytest.approx(
        expected.item(), rel=1e-4
    )


def test_prototypes_move_towards_what_is_assigned_to_them() -> None:
    method = build("online_clustering", momentum=0.0, bn=False)
    clusters = method.clusters["global"]
    before, weights = clusters.prototypes.double(), clusters.weights.double()
    method.prepare(views(), BATCH)
    method.after_step()
    queue = method.queues["global"].embeddings.double()
    codes = (queue @ before.T / 0.05 + weights).softmax(1)
    torch.testing.assert_close(
        clusters.prototypes.double(), F.normalize(codes.T @ queue, dim=1), rtol=1e-4, atol=1e-4
    )


def test_k_means_runs_on_the_queue_when_it_is_due_and_only_then() -> None:
    method = build("k_means", bn=False)
    clusters = method.clusters["local"]
    start = clusters.prototypes.clone()
    for step in range(1, 7):
        before = clusters.prototypes.clone()
        method.prepare(views(seed=step), BATCH)
        method.after_step()
        assert torch.equal(clusters.prototypes, before) == (step % 3 != 0)
        if step == 3:
            expected = reference.k_means(
                method.queues["local"].embeddings, start, clustering.LLOYD_ITERATIONS
            )
            torch.testing.assert_close(clusters.prototypes.double(), expected, rtol=1e-4, atol=1e-4)


def test_symmetric_views_are_compared_with_the_teachers_own_and_other_view() -> None:
    method, batch = build("seed_strong", bn=False), views()
    student = method.trainable["a"]
    out = method.loss("a", student, method.prepare(batch, BATCH))
    queue = method.queues["global"].embeddings
    pairs = [
        seed_formula(student(s), method.teacher(t), queue)
        for s in batch["global"]
        for t in batch["global"]
    ]
    assert out["loss_global"].item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    flat = batch["local"].flatten(0, 1)
    own = seed_formula(student(flat), method.teacher(flat), method.queues["local"].embeddings)
    assert out["loss_local"].item() == pytest.approx(own.item(), rel=1e-5)


def test_regression_compares_lengths_and_keeps_unit_embeddings_in_the_queue() -> None:
    method, batch = build("regression", bn=False), views()
    reduction = Reduction(tiny.DIM, tiny.DIM, elementwise=True, unit_length=False)
    reduction.components.fill_(7.0)
    method.teacher.reduce_by(reduction)
    student = method.trainable["a"]
    out = method.loss("a", student, method.prepare(batch, BATCH))
    for resolution, images in batch.items():
        flat = images.flatten(0, 1)
        raw = student.head(student.features(flat))
        teacher = 7 * F.normalize(method.teacher.head(method.teacher.encoder(flat)), dim=1)
        expected = reference.regression_loss(raw, teacher, 0.5)
        assert out[f"loss_{resolution}"].item() == pytest.approx(expected.item(), rel=1e-5)
        if resolution == "global":
            cosine = F.cosine_similarity(raw, teacher).mean()
            assert out["teacher_cosine"].item() == pytest.approx(cosine.item(), rel=1e-4)
    method.after_step()
    lengths = method.queues["global"].embeddings.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(21))


def test_disco_adds_the_students_own_contrast_to_the_distance() -> None:
    method, batch = build("disco", ("a", "b"), bn=False), views()
    student = method.trainable["a"]
    out = method.loss("a", student, method.prepare(batch, BATCH))
    assert method.contrast is not None
    query, key = batch["global"]
    contrast = reference.info_nce(
        student(query).detach(), student(key).detach(), method.contrast.queues["a"].embeddings, 0.2
    )
    assert out["loss_contrast"].item() == pytest.approx(contrast, rel=1e-5)
    for resolution, images in batch.items():
        flat = images.flatten(0, 1)
        expected = 0.5 * reference.squared_distance(student(flat), method.teacher(flat))
        assert out[f"loss_{resolution}"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out["loss"].item() == pytest.approx(
        sum(out[f"loss_{key}"].item() for key in ("global", "local", "contrast"))
    )
    idle = copy.deepcopy(method.contrast.queues["b"].state_dict())
    method.after_step()
    torch.testing.assert_close(method.contrast.queues["a"].embeddings[:5], student(key))
    tiny.assert_same(idle, method.contrast.queues["b"].state_dict())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_descending_its_gradient_lowers_the_loss_of_a_batch(name: str) -> None:
    method = build(name)
    student, prepared = method.trainable["a"].train(), prepared_by(method)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    curve = []
    for _ in range(20):
        loss = method.loss("a", student, prepared)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < curve[10] < curve[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_interrupted_by_its_data_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    straight, broken, resumed = (build(name, ("a", "b"), dropout=0.3) for _ in range(3))
    tiny.train(straight, tmp_path / "straight")
    with pytest.raises(ValueError, match="unplugged"):
        tiny.train(
            broken, tmp_path / "broken", source=tiny.Images(fail_after=8 * 9 + 3)
        )  # two steps after k-means ran
    tiny.train(resumed, tmp_path / "broken")
    tiny.assert_same(
        tiny.last_checkpoint(tmp_path / "straight"), tiny.last_checkpoint(tmp_path / "broken")
    )
    tiny.assert_same(straight.carried.state_dict(), resumed.carried.state_dict())
    assert (tmp_path / "straight/metrics.jsonl").read_bytes() == (
        tmp_path / "broken/metrics.jsonl"
    ).read_bytes()
    rows = [
        json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()
    ]
    part = "b/loss_mixed" if OBJECTIVES[name].pairs else "b/loss_local"
    assert {"a/loss", part, "teacher_entropy", "b/embedding_rank"} <= rows[0].keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_student_of_a_fleet_becomes_what_it_becomes_alone(name: str, tmp_path: Path) -> None:
    fleet, alone = build(name, ("b", "a")), build(name)
    for method, folder in ((fleet, "fleet"), (alone, "alone")):
        tiny.train(method, tmp_path / folder, tiny.fit_config(steps=5, eval_every=0))
    tiny.assert_same(tiny.weights(fleet)["a"], tiny.weights(alone)["a"])


def test_only_what_an_objective_needs_goes_into_its_checkpoints() -> None:
    of_seed = set(build("seed").carried.state_dict())
    assert of_seed == {
        f"{name}.{key}" for name in ("global", "local") for key in ("embeddings", "_extra_state")
    }
    assert set(build("bingo_bags").carried.state_dict()) < of_seed
    more = {
        name: {key.split(".")[0] for key in set(build(name).carried.state_dict()) - of_seed}
        for name in OBJECTIVES
    }
    assert {name: keys for name, keys in more.items() if keys} == {
        "k_means": {"clusters"},
        "online_clustering": {"clusters"},
        "disco": {"contrast"},
    }


def clusters_after_steps(name: str) -> dict[str, Tensor]:
    """The state of a rank after steps with images that the ranks do not share."""
    method = build(name)
    for step in range(4):
        method.prepare(views(seed=10 * step + rank()), BATCH)
        method.after_step()
    return method.carried.state_dict()


@pytest.mark.parametrize("name", ["k_means", "online_clustering"])
def test_clusters_are_the_same_on_all_ranks(name: str, two_ranks: Ranks) -> None:
    one, two = two_ranks.run(clusters_after_steps, name)
    tiny.assert_same(one, two)
    assert not torch.equal(
        one["clusters.global.prototypes"], build(name).clusters["global"].prototypes
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_rehearsal_leaves_no_trace(name: str) -> None:
    method = build(name)
    before, weights = copy.deepcopy(method.carried.state_dict()), tiny.weights(method)
    twin = method.rehearsal()
    twin.loss("a", twin.trainable["a"], prepared_by(twin))["loss"].backward()
    twin.after_step()
    tiny.assert_same(before, method.carried.state_dict())
    tiny.assert_same(weights, tiny.weights(method))


def test_the_deep_head_is_that_of_simreg() -> None:
    head = projection_head(6, None, 4, deep=True)
    assert head_layers(head) == "-".join(2 * ["Linear-BatchNorm1d-ReLU-Linear"])
    assert [tuple(layer.weight.shape) for layer in head if isinstance(layer, torch.nn.Linear)] == [
        (12, 6),
        (6, 12),
        (12, 6),
        (4, 12),
    ]
    assert projection_head(6, 20, 4, deep=True)[0].out_features == 20


# --- options --------------------------------------------------------------------------------------


OUT_OF_RANGE: dict[str, list[float]] = {
    "queue_size": [0],
    "hidden_dim": [-1],
    "tau_student": [0, math.nan],
    "tau_teacher": [0, math.nan],
    "weight": [-0.1, math.inf],
    "momentum": [-0.1, 1.1],
    "bag_size": [0],
    "num_clusters": [0],
    "cluster_every": [0],
    "bn_group_size": [1],
    "own_epochs": [-1],
    "effective_neighbours": [1, 0.5],
    "dense_weight": [-0.1, math.inf],
    "smooth_share": [-0.1, 1.1],
}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, schema in OBJECTIVE_CONFIGS.items()
        for option in sorted(
            options_of(schema)
            - {"name", "deep_head", "queue_init", "teacher_statistics", "effective_neighbours_per"}
        )
    ],
)
def test_an_option_out_of_its_range_is_refused_by_name(name: str, option: str) -> None:
    for wrong in OUT_OF_RANGE[option]:
        with pytest.raises(ValueError, match=rf"objective\.{option} .* got {wrong}"):
            OBJECTIVE_CONFIGS[name](**{option: wrong})


def test_a_share_above_the_whole_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.weight must be in \[0, 1\], got 1\.5"):
        OBJECTIVE_CONFIGS["bingo"](**{"weight": 1.5})


def recording(name: str, read: set[str], **options: Any) -> ObjectiveConfig:
    """Options of an objective that note in `read` which of them are looked at."""
    schema = OBJECTIVE_CONFIGS[name]

    def look(self: ObjectiveConfig, option: str) -> object:
        read.add(option)
        return object.__getattribute__(self, option)

    config: ObjectiveConfig = type("Recording", (schema,), {"__getattribute__": look})(**options)
    read.clear()
    return config


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_has_the_options_that_its_training_reads_and_no_others(name: str) -> None:
    read: set[str] = set()
    clusters = {"num_clusters": 6} if "num_clusters" in options_of(OBJECTIVE_CONFIGS[name]) else {}
    more = {
        "own_epochs": 0,
        "effective_neighbours": None,
        "teacher_statistics": TeacherStatistics.batch,
    }
    of_teacher = {
        key: value for key, value in more.items() if key in options_of(OBJECTIVE_CONFIGS[name])
    }
    method = seed_method(recording(name, read, queue_size=21, **clusters, **of_teacher))
    method.loss("a", method.trainable["a"], prepared_by(method))
    method.after_step()
    # Read by the students, before training, and with a number of effective neighbours.
    of_others = (
        {"hidden_dim", "deep_head", "queue_init", "dense_weight"}
        | {"effective_neighbours_per"}
        | ({"bag_size"} if method.rows_per_image == 2 else set())
    )
    schema = OBJECTIVE_CONFIGS[name]
    assert read & options_of(schema) - of_others == options_of(schema) - of_others


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_diagnostics_take_the_teachers_temperature_or_that_of_seed(name: str) -> None:
    method = build(name)
    prepared = prepared_by(method)
    queue, teacher = method.queues["global"].embeddings, prepared.teacher["global"]
    tau = dict.fromkeys(("seed", "seed_strong", "seed_general"), 0.05)
    tau |= {"online_clustering": 0.05, "compress": 0.2}
    entropy = losses.target_entropy(teacher, queue, tau_teacher=tau.get(name, 0.01)).mean()
    assert torch.equal(method.diagnostics(prepared)["teacher_entropy"], entropy)


@pytest.mark.parametrize(("scale", "num"), [("full", 3000), ("small", 300), ("smoke", 16)])
@pytest.mark.parametrize("name", ["k_means", "online_clustering"])
def test_a_scale_sets_the_number_of_clusters_and_the_command_line_wins(
    name: str, scale: str, num: int
) -> None:
    chosen = [f"objective={name}", f"scale={scale}"]
    assert compose("distill", chosen).objective.num_clusters == num
    assert compose("distill", [*chosen, "objective.num_clusters=9"]).objective.num_clusters == 9


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_has_its_values_and_brings_the_views_and_the_head_that_it_needs(
    name: str,
) -> None:
    config = compose(
        "distill", [f"objective={name}", "views=swav_multicrop", "student=[resnet18,resnet34]"]
    )
    needed = OBJECTIVES[name].min_global_views == 2
    assert {key: crop.num for key, crop in config.views.crops.items()} == {
        "global": 2 if needed else 1,
        "local": 6,
    }
    assert {student.hidden_dim for student in config.students.values()} == {
        config.objective.hidden_dim
    }
    widths = dict.fromkeys(("seed_strong", "disco", "bingo", "bingo_bags"), 2048)
    widths["seed_general"] = 0
    assert config.objective.hidden_dim == widths.get(name)
    assert {student.deep_head for student in config.students.values()} == {name == "simreg"}
    layers = {head_layers(student.head) for student in build_students(config, 16).values()}
    heads = {"simreg": "-".join(["Linear-BatchNorm1d-ReLU-Linear"] * 2), "seed_general": "Linear"}
    assert layers == {heads.get(name, "Linear-ReLU-Linear")}
    assert config.objective == OBJECTIVE_CONFIGS[name]()


def test_a_students_own_head_goes_before_that_of_the_objective() -> None:
    own = "students.resnet18.hidden_dim=64"
    assert compose("distill", ["objective=seed_strong", own]).students["resnet18"].hidden_dim == 64
    own = "students.resnet18.deep_head=false"
    assert compose("distill", ["objective=simreg", own]).students["resnet18"].deep_head is False


def test_one_view_is_refused_where_two_are_compared() -> None:
    assert {name for name, objective in OBJECTIVES.items() if objective.min_global_views == 2} == {
        "seed_strong",
        "disco",
        "bingo_bags",
    }
    assert {objective.min_global_views for objective in OBJECTIVES.values()} == {1, 2}
    for name in ("seed_strong", "disco", "bingo_bags"):
        config = compose("distill", [f"objective={name}", "views.crops.global.num=1"])
        with pytest.raises(
            ValueError,
            match=rf"objective={name} compares 2 global views .* views\.crops\.global\.num is 1",
        ):
            distill(config)


# --- the command ----------------------------------------------------------------------------------

DIGITS = [
    "data=digits",
    "data.num_workers=0",
    "device=cpu",
    "views=digits",
    "tracker=files",
    "batch_size=32",
    "log_every=5",
]
QUICK = [
    "knn_bank_size=200",
    "knn_query_size=100",
    "optimizer.warmup_epochs=0",
    "optimizer.lr=0.3",
    "checkpoint_every=7",
]


CLUSTERS = {"num_clusters": 20, "cluster_every": 5}


def command(name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", f"seed_exp.{name}", *DIGITS, *QUICK, *options]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    options = ["student=convnet_w2", "moco.queue_size=64", "steps=20", f"run_dir={folder}"]
    forks.run(command("pretrain", *options), check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, []) for name in OBJECTIVES),
        ("seed", ["objective.dense_weight=0.5", "teacher.num_reduce_images=50"]),
        ("regression", ["teacher.reduce=phi_s", "objective.dense_weight=2"]),
    ],
)
def test_the_command_trains_a_fleet_and_resumes_it_bit_for_bit(
    name: str, more: list[str], teacher: Path, tmp_path: Path
) -> None:
    own = options_of(OBJECTIVE_CONFIGS[name])
    options = [
        f"objective={name}",
        "student=[convnet_w2,convnet_w32]",
        "teacher=run",
        f"teacher.checkpoint={teacher}",
    ]
    options += [
        "objective.queue_size=128",
        *(f"objective.{key}={value}" for key, value in CLUSTERS.items() if key in own),
        "steps=24",
        *more,
    ]
    straight = command("distill", *options, f"run_dir={tmp_path}/straight")
    forks.run(straight, check=True, capture_output=True)
    rows = [
        json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()
    ]
    for student in ("convnet_w2", "convnet_w32"):
        curve = [row[f"{student}/loss"] for row in rows if f"{student}/loss" in row]
        assert len(curve) == 5
        assert all(math.isfinite(loss) for loss in curve)

    broken = tmp_path / "broken"
    with forks.Popen(
        command("distill", *options, f"run_dir={broken}"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and not list(broken.glob("checkpoints/step_*.pt")):
            time.sleep(0.05)
        process.kill()
    forks.run(command("distill", *options, f"run_dir={broken}"), check=True, capture_output=True)
    tiny.assert_same(tiny.last_checkpoint(tmp_path / "straight"), tiny.last_checkpoint(broken))
