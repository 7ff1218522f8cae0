"""BINGO with bags: pairs of images, their loss, and where they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny
import torch
from ranks import Ranks
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from seed_exp.config.compose import compose
from seed_exp.config.schema import BingoBagsConfig, DistillConfig, TeacherStatistics
from seed_exp.data.order import SampleOrder
from seed_exp.methods.bags import CUTMIX_STREAM, BagSeed
from seed_exp.methods.teacher_cache import TeacherCache
from seed_exp.training import bags as module
from seed_exp.training.bags import find_bags, kept_bags, read_bags
from seed_exp.training.distillation import distill
from seed_exp.views.cutmix import NUM_CUTMIX_DRAWS, cutmix, cutmix_boxes
from seed_exp.views.draws import uniforms
from seed_exp.views.recipe import TrainViews

NUM = 40  # images of tiny.Images()
BAGS = find_bags(tiny.embeddings(NUM, 6, 0), 3, torch.device("cpu"))


def build(
    cache: TeacherCache | None = None, names: tuple[str, ...] = ("a",), **options: Any
) -> BagSeed:
    config = BingoBagsConfig(queue_size=21, bag_size=3, weight=0.3, **options)
    students = tiny.students(names, bn=False)
    return BagSeed(students, tiny.teacher(), config, ["global"], 3, cache, bags=BAGS)


def views(num_pairs: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"global": torch.randn(2, 2 * num_pairs, 3, 8, 8, generator=generator)}


# --- bags and pairs -------------------------------------------------------------------------------


def test_a_bag_has_the_nearest_other_images_and_never_the_image() -> None:
    features = tiny.embeddings(30, 5, 0)
    features[7] = features[3]  # twins: 7 must not lose a neighbour for the image that is like it
    found = find_bags(3 * features, 4, torch.device("cpu"))
    for index, bag in enumerate(found.tolist()):
        others = [other for other in range(30) if other != index]
        nearest = sorted(others, key=lambda other: -float(features[index] @ features[other]))
        assert bag[0] == (nearest[0] if index not in (3, 7) else 10 - index)
        assert set(bag) == set(nearest[:4])


def test_bags_found_in_parts_are_those_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features = tiny.embeddings(30, 5, 0)
    whole = find_bags(features, 4, torch.device("cpu"))
    monkeypatch.setattr(module, "QUERIES", 7)
    assert torch.equal(find_bags(features, 4, torch.device("cpu")), whole)


def test_every_image_is_followed_by_one_of_its_bag_drawn_anew_in_each_epoch() -> None:
    method, images = build(), np.arange(NUM)
    drawn: dict[int, set[int]] = {index: set() for index in range(NUM)}
    for epoch in range(40):
        rows = method.rows(epoch, images)
        assert rows[0::2].tolist() == images.tolist()
        for image, other in zip(images.tolist(), rows[1::2].tolist(), strict=True):
            drawn[image].add(other)
    assert drawn == {index: set(BAGS[index].tolist()) for index in range(NUM)}


def test_pairs_do_not_depend_on_the_number_of_processes() -> None:
    method = build()
    alone = SampleOrder(NUM, 8, seed=1)
    shares = [SampleOrder(NUM, 8, 1, rank, 2) for rank in range(2)]
    for step in range(12):
        whole = method.rows(*alone.batch(step))
        assert np.array_equal(
            whole, np.concatenate([method.rows(*one.batch(step)) for one in shares])
        )


# --- CutMix ---------------------------------------------------------------------------------------


def test_a_mix_has_a_rectangle_of_the_other_view_and_knows_its_share() -> None:
    boxes, share = cutmix_boxes(np.random.default_rng(0).random((200, NUM_CUTMIX_DRAWS)), 12)
    ones, zeros = torch.ones(200, 3, 12, 12), torch.zeros(200, 3, 12, 12)
    mixed = cutmix(ones, zeros, torch.from_numpy(boxes))
    np.testing.assert_allclose(mixed.mean((1, 2, 3)).numpy(), share, atol=1e-6)
    for picture, (top, left, bottom, right) in zip(mixed, boxes.tolist(), strict=True):
        expected = torch.ones(3, 12, 12)
        expected[:, top:bottom, left:right] = 0
        assert torch.equal(picture, expected)


def test_shares_are_those_of_beta_2_2_before_rectangles_are_cut_off() -> None:
    """At the centre nothing is cut off: P(share < 1/4) = 3/16 - 2/64 = 0.156, the mean is 1/2."""
    draws = np.random.default_rng(1).random((40_000, NUM_CUTMIX_DRAWS))
    draws[:, 3:] = 0.5
    _, share = cutmix_boxes(draws, 512)
    assert share.mean() == pytest.approx(0.5, abs=0.01)
    assert (share < 0.25).mean() == pytest.approx(0.15625, abs=0.01)


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch", "weight"), [(1, 0.0), (2, 0.3)])
def test_the_three_views_are_compared_as_released(epoch: int, weight: float) -> None:
    """Own positive and that of the other image of the pair; in the first epochs the own alone."""
    method, batch = build(own_epochs=2), views()
    student = method.trainable["a"]
    out = method.loss("a", student, method.prepare(batch, tiny.host_batch(10, epoch=epoch)))
    own, other = batch["global"][0, 0::2], batch["global"][0, 1::2]
    one, two = (method.teacher(batch["global"][1, place::2]) for place in (0, 1))
    draws = uniforms(3, epoch, np.arange(0, 10, 2), CUTMIX_STREAM, NUM_CUTMIX_DRAWS)
    mixed, shares = own.clone(), []
    for row, (top, left, bottom, right) in enumerate(cutmix_boxes(draws, 8)[0].tolist()):
        mixed[row, :, top:bottom, left:right] = other[row, :, top:bottom, left:right]
        shares.append(1 - (bottom - top) * (right - left) / 64)
    queue = method.queues["global"].embeddings
    expected = {
        "loss_own": reference.bag_loss(student(own), one, two, queue, [1 - weight] * 5, 0.2),
        "loss_bag": reference.bag_loss(student(other), two, one, queue, [1 - weight] * 5, 0.2),
        "loss_mixed": reference.bag_loss(student(mixed), one, two, queue, shares, 0.2),
    }
    for name, value in expected.items():
        assert out[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert out["loss"].item() == pytest.approx(sum(expected.values()).item() / 3, rel=1e-5)
    method.after_step()
    torch.testing.assert_close(method.queues["global"].embeddings[:5], one)


def test_a_cache_changes_nothing(tmp_path: Path) -> None:
    cache = TeacherCache(
        tmp_path, {}, num_images=NUM, num_views={"global": 2}, embedding_dim=tiny.DIM
    )
    batch, without = views(), build()
    expected = without.loss(
        "a", without.trainable["a"], without.prepare(batch, tiny.host_batch(10))
    )
    for _ in ("writes", "reads"):
        method = build(cache)
        found = method.loss("a", method.trainable["a"], method.prepare(batch, tiny.host_batch(10)))
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-6)
        cache.close()  # waits for the thread that writes
        assert cache.read(0, torch.arange(10)) is not None


# --- the teacher's statistics ---------------------------------------------------------------------


def test_a_teacher_by_batch_normalises_groups_of_images_and_pairs_apart() -> None:
    batch = views(6)
    method = build(teacher_statistics=TeacherStatistics.batch, bn_group_size=3)
    targets = method.prepare(batch, tiny.host_batch(12))
    fresh = tiny.teacher()

    def by_hand(images: Tensor) -> Tensor:
        conv, norm = fresh.encoder.layers[0], fresh.encoder.layers[1]
        maps = conv(images)
        mean, var = (
            maps.mean((0, 2, 3), keepdim=True),
            maps.var((0, 2, 3), correction=0, keepdim=True),
        )
        maps = (maps - mean) / (var + norm.eps).sqrt()
        return F.normalize(fresh.head(maps.relu().mean((2, 3))), dim=1)

    for place, found in ((0, targets.teacher["global"]), (1, targets.other_teacher)):
        images = batch["global"][1, place::2]
        expected = torch.cat([by_hand(images[:3]), by_hand(images[3:])])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(targets.teacher["global"], fresh(batch["global"][1, 0::2]), atol=1e-3)


# --- runs -----------------------------------------------------------------------------------------


def trained(folder: str) -> dict[str, Any]:
    """The newest checkpoint of a training of a few steps."""
    tiny.train(build(own_epochs=1), Path(folder), tiny.fit_config(steps=7, eval_every=0))
    return tiny.last_checkpoint(Path(folder)) if torch.distributed.get_rank() == 0 else {}


def test_two_processes_put_into_the_queue_what_one_puts(two_ranks: Ranks, tmp_path: Path) -> None:
    found, _ = two_ranks.run(trained, str(tmp_path / "two"))
    tiny.train(build(own_epochs=1), tmp_path / "one", tiny.fit_config(steps=7, eval_every=0))
    expected = tiny.last_checkpoint(tmp_path / "one")
    torch.testing.assert_close(
        found["carried"]["global.embeddings"], expected["carried"]["global.embeddings"]
    )
    torch.testing.assert_close(found["networks"]["a"], expected["networks"]["a"])


def config(*words: str) -> DistillConfig:
    options = [
        "data=digits",
        "data.num_workers=0",
        "student=convnet_w2",
        "device=cpu",
        "objective=bingo_bags",
    ]
    composed: DistillConfig = compose(
        "distill", [*options, "views=digits", "views.eval_size=8", "views.eval_resize=8", *words]
    )
    return composed


def test_a_run_keeps_its_bags_and_others_find_them_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEED_CACHE", str(tmp_path / "cache"))
    teacher, images = tiny.teacher(), tiny.Images(NUM)
    first = kept_bags(tmp_path, teacher, config(), images)
    assert first.shape == (NUM, 5)
    monkeypatch.setattr(module, "of_images", None)  # nothing is computed again
    (tmp_path / "other").mkdir()
    assert torch.equal(kept_bags(tmp_path / "other", teacher, config("seed=9"), images), first)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "bags.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="is damaged"):
        kept_bags(tmp_path, teacher, config(), images)
    (tmp_path / "bags.safetensors").unlink()
    with pytest.raises(ValueError, match="is gone"):
        kept_bags(tmp_path, teacher, config(), images)


def test_bags_are_of_features_whatever_the_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEED_CACHE", str(tmp_path / "cache"))
    teacher, images = tiny.teacher(), tiny.Images(NUM)
    options = config()
    flat = [
        F.interpolate(images.image(i)[None].float() / 255, size=8, mode="bilinear", antialias=True)
        for i in range(NUM)
    ]
    mean, std = (
        torch.tensor(value).view(3, 1, 1) for value in (options.views.mean, options.views.std)
    )
    features = F.normalize(teacher.features((torch.cat(flat) - mean) / std), dim=1)
    similarity = features @ features.T - 2 * torch.eye(NUM)
    bags = kept_bags(tmp_path, teacher, options, images)
    chosen, best = similarity.gather(1, bags), similarity.topk(5).values
    torch.testing.assert_close(chosen, best, rtol=0, atol=2e-3)  # pixels are rounded to 8 bits


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["views=swav_multicrop"], r"objective=bingo_bags uses global views only"),
        (["views.crops.global.num=1"], r"objective=bingo_bags compares 2 global views"),
    ],
)
def test_views_that_make_no_pairs_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill(config(*words))


def test_more_neighbours_than_other_images_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEED_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"objective\.bag_size=40 .* more than 40 images"):
        kept_bags(tmp_path, tiny.teacher(), config("objective.bag_size=40"), tiny.Images(NUM))


@pytest.mark.parametrize("name", ["disco", "bingo_bags"])
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("teacher_cache=/x", r"teacher_cache=/x needs a teacher whose embedding"),
        ("teacher.reduce=pca", r"teacher\.reduce=pca needs a teacher whose embedding"),
        ("objective.queue_init=teacher", r"queue_init=teacher takes embeddings of single images"),
    ],
)
def test_what_needs_embeddings_of_single_images_is_refused_with_a_teacher_by_batch(
    name: str, word: str, message: str
) -> None:
    words = [f"objective={name}", "objective.teacher_statistics=batch"]
    compose("distill", words)
    with pytest.raises(ValueError, match=message):
        compose("distill", [*words, word])


def test_the_views_of_an_image_in_a_bag_are_those_that_it_has_in_this_epoch() -> None:
    """So a teacher cache holds them already, and any process can make them."""
    images, method = tiny.Images(NUM), build()
    host = TrainViews(
        dataclasses.replace(
            tiny.views_config(), crops={"global": tiny.views_config().crops["global"]}
        ),
        1,
    )
    rows = method.rows(4, np.array([5, 9]))

    def made(indices: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        out = host.empty(len(indices))
        host.host(
            [images.image(i) for i in indices.tolist()], images.labels[indices], 4, indices, out
        )
        return host.device(out)["global"]

    assert torch.equal(made(rows)[:, 1], made(rows[1:2])[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bags: bags[:, :1], "bags"),  # another size
        (lambda bags: bags + NUM, "images that do not exist"),
        (lambda bags: -1 - bags, "images that do not exist"),
    ],
)
def test_bags_that_cannot_be_right_are_refused(
    change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bags.safetensors"
    path.write_bytes(save({"bags": change(BAGS.int()).contiguous()}))
    with pytest.raises(ValueError, match=rf"is damaged \(.*{message}"):
        read_bags(path, NUM, BAGS.shape[1])
    path.write_bytes(save({"bags": BAGS.int()}))
    assert torch.equal(read_bags(path, NUM, BAGS.shape[1])["bags"].long(), BAGS)
