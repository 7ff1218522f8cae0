from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import tiny
import torch
from ranks import Ranks
from torch import Tensor

from seed_exp.config.schema import InfoNCEConfig, ObjectiveConfig, QueueInit, SeedConfig
from seed_exp.methods.seed import Seed

BATCH = tiny.host_batch(5)


def views(num_images: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "global": torch.randn(2, num_images, 3, 8, 8, generator=generator),
        "local": torch.randn(3, num_images, 3, 6, 6, generator=generator),
    }


def embedded(method: Seed, images: Tensor) -> Tensor:
    """The teacher's embeddings, image by image."""
    return torch.cat([method.teacher(image[None]) for image in images])


def test_the_loss_is_the_sum_over_resolutions_of_the_formula() -> None:
    method = tiny.seed(bn=False)
    batch = views()
    student = method.trainable["a"]
    out = method.loss("a", student, method.prepare(batch, BATCH))
    parts = {}
    for resolution, images in batch.items():
        flat = images.flatten(0, 1)
        parts[resolution] = reference.seed_loss_matrix(
            student(flat), embedded(method, flat), method.queues[resolution].embeddings, 0.2, 0.05
        )
        assert out[f"loss_{resolution}"].item() == pytest.approx(parts[resolution].item(), abs=1e-5)
    assert out["loss"].item() == pytest.approx(sum(parts.values()).item(), abs=1e-5)
    parameters = list(student.parameters())
    ours = torch.autograd.grad(out["loss"], parameters)
    expected = torch.autograd.grad(sum(parts.values()), parameters)
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_cosine_is_that_of_student_and_teacher_in_global_views() -> None:
    method = tiny.seed(bn=False)
    batch = views()
    out = method.loss("a", method.trainable["a"], method.prepare(batch, BATCH))
    flat = batch["global"].flatten(0, 1)
    cosine = torch.nn.functional.cosine_similarity(
        method.trainable["a"](flat), embedded(method, flat)
    ).mean()
    assert out["teacher_cosine"].item() == pytest.approx(cosine.item(), abs=1e-6)
    assert not out["teacher_cosine"].requires_grad


def test_diagnostics_are_entropy_and_effective_neighbours_of_the_global_target() -> None:
    method = tiny.seed()
    batch = views()
    found = method.diagnostics(method.prepare(batch, BATCH))
    entropies = []
    for embedding in embedded(method, batch["global"].flatten(0, 1)).double():
        entries = [embedding, *method.queues["global"].embeddings.double()]
        target = torch.tensor(
            reference.softmax([float(embedding @ entry) / 0.05 for entry in entries])
        )
        entropies.append(-(target * target.clamp(min=1e-300).log()).sum())
    assert found["teacher_entropy"].item() == pytest.approx(
        torch.stack(entropies).mean().item(), abs=1e-4
    )
    assert found["effective_neighbours"].item() == pytest.approx(
        torch.stack(entropies).exp().mean().item(), rel=1e-4
    )


def test_each_images_first_view_enters_the_queue_of_its_resolution_after_the_step() -> None:
    method = tiny.seed()
    before = {name: queue.embeddings.clone() for name, queue in method.queues.items()}
    batch = views()
    prepared = method.prepare(batch, BATCH)
    method.loss("a", method.trainable["a"], prepared)["loss"].backward()
    for name, queue in method.queues.items():
        assert torch.equal(queue.embeddings, before[name]), "not before the step"
    method.after_step()
    for name, queue in method.queues.items():
        torch.testing.assert_close(queue.embeddings[:5], embedded(method, batch[name][0]))
        assert torch.equal(queue.embeddings[5:], before[name][5:])
        assert queue.position == 5


def test_parts_of_a_batch_enter_the_queue_together_and_once() -> None:
    method = tiny.seed(queue_size=100)
    batches = [views(5, seed) for seed in range(4)]
    for first in (0, 2):
        for batch in batches[first : first + 2]:
            method.prepare(batch, BATCH)
        method.after_step()
    expected = torch.cat([embedded(method, batch["local"][0]) for batch in batches])
    torch.testing.assert_close(method.queues["local"].embeddings[:20], expected)
    assert method.queues["local"].position == 20


def test_the_teacher_sees_each_resolution_once_however_many_students_there_are() -> None:
    method = tiny.seed(["a", "b", "c"])
    shapes: list[torch.Size] = []
    method.teacher.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    prepared = method.prepare(views(), BATCH)
    for name, student in method.trainable.items():
        method.loss(name, student, prepared)
    method.after_step()
    assert shapes == [(10, 3, 8, 8), (15, 3, 6, 6)]


def test_the_teacher_stays_frozen_in_evaluation_mode_and_out_of_checkpoints() -> None:
    method = tiny.seed()
    before = copy.deepcopy(method.teacher.state_dict())
    method.train()
    prepared = method.prepare(views(), BATCH)
    method.loss("a", method.trainable["a"], prepared)["loss"].backward()
    tiny.assert_same(before, method.teacher.state_dict())
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())
    assert all(not embeddings.requires_grad for embeddings in prepared.teacher.values())
    assert not any("teacher" in key for key in method.carried.state_dict())


def test_queues_are_as_wide_as_the_teacher_and_the_same_in_every_run_with_that_seed() -> None:
    one, two = tiny.seed(), tiny.seed(["b", "c"])
    for name, queue in one.queues.items():
        assert queue.embeddings.shape == (21, tiny.DIM)
        assert torch.equal(queue.embeddings, two.queues[name].embeddings)


def test_one_resolution_is_enough() -> None:
    method = Seed(tiny.students(), tiny.teacher(), SeedConfig(queue_size=8), ["global"], seed=0)
    out = method.loss(
        "a", method.trainable["a"], method.prepare({"global": views()["global"]}, BATCH)
    )
    assert out["loss"].item() == out["loss_global"].item()
    method.after_step()
    assert method.queues["global"].position == 5


@dataclass
class Mistyped(ObjectiveConfig):
    name: str = "sed"


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown objective 'sed'; did you mean 'seed'"):
        Seed(tiny.students(), tiny.teacher(), Mistyped(), ["global"], seed=0)


def advised(
    values: list[float], *, queue_size: int = 16, head: bool = True, **options: Any
) -> list[int]:
    """The log lines, from 1, at which `Seed` says that the target is one-hot; 8 images each."""
    config, teacher = SeedConfig(queue_size=queue_size, **options), tiny.teacher()
    if not head:
        teacher.drop_head()
    method = Seed(tiny.students(), teacher, config, ["global"], seed=0)
    advice = [
        method.advice({"effective_neighbours": value}, num_seen=8 * (line + 1), num_images=40)
        for line, value in enumerate(values)
    ]
    assert all("objective.tau_teacher" in sentence for sentence in advice if sentence)
    return [line + 1 for line, sentence in enumerate(advice) if sentence]


def test_a_one_hot_target_is_named_once_when_the_queue_holds_no_random_vectors() -> None:
    ones, queue = [1.0001] * 20, QueueInit.teacher
    assert advised(ones, queue_init=queue) == [5]
    assert advised(ones) == [6], "the first line with 16 embeddings of images is the second"
    assert advised(ones, queue_size=65536) == [9], "every image has been in the queue at line 5"
    assert advised([1.0, 1.0, 1.5] * 7, queue_init=queue) == []
    assert advised([1.0, 1.0, 1.5, *ones], queue_init=queue) == [8]
    assert advised([1.5, *ones], queue_init=queue, head=False) == [2], "a general encoder"


def test_objectives_without_a_tempered_target_of_their_own_are_not_called_one_hot() -> None:
    method = Seed(tiny.students(), tiny.teacher(), InfoNCEConfig(queue_size=8), ["global"], seed=0)
    for line in range(9):
        shown = {"effective_neighbours": 1.0}
        assert method.advice(shown, num_seen=100 * line, num_images=40) is None


def enqueue_share(rank_images: int) -> Any:
    """Each rank prepares its part of the global batch in two parts."""
    from seed_exp.engine import distributed

    method = tiny.seed()
    start = distributed.rank() * rank_images
    for half in (
        slice(start, start + rank_images // 2),
        slice(start + rank_images // 2, start + rank_images),
    ):
        method.prepare(
            {name: view[:, half] for name, view in views(2 * rank_images).items()}, BATCH
        )
    method.after_step()
    return method.carried.state_dict()


def test_every_rank_enqueues_the_global_batch_in_its_order(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(enqueue_share, 6)
    tiny.assert_same(first, second)
    method = tiny.seed()
    method.prepare(views(12), BATCH)
    method.after_step()
    for key, value in method.carried.state_dict().items():
        torch.testing.assert_close(first[key], value)
