from __future__ import annotations

import copy

import pytest
import reference
import tiny
import torch
from ranks import Ranks
from torch import Tensor

from seed_exp.config.schema import MocoConfig
from seed_exp.engine import distributed
from seed_exp.methods import momentum
from seed_exp.methods.moco import Moco
from seed_exp.methods.momentum import dealt_out
from seed_exp.models.students import Student

BATCH = tiny.host_batch(5)


def views(num_images: int = 5) -> dict[str, Tensor]:
    return {
        "global": torch.randn(2, num_images, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    }


def move(student: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_the_momentum_encoder_begins_as_a_copy_and_follows_by_the_formula() -> None:
    method = tiny.moco(["a", "b"])
    encoders = {
        name: [p.clone() for p in encoder.parameters()]
        for name, encoder in method.contrast.encoders.items()
    }
    for name, student in method.trainable.items():
        assert all(
            torch.equal(one, two)
            for one, two in zip(encoders[name], student.parameters(), strict=True)
        )
    for _ in range(3):
        prepared = method.prepare(views(), BATCH)
        for name, student in method.trainable.items():
            method.loss(name, student, prepared)
            move(student)
        method.after_step()
        for name, student in method.trainable.items():
            encoders[name] = [
                0.9 * old + 0.1 * new
                for old, new in zip(encoders[name], student.parameters(), strict=True)
            ]
    for name, encoder in method.contrast.encoders.items():
        for expected, parameter in zip(encoders[name], encoder.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected)


def test_the_loss_is_that_of_finding_the_momentum_encoders_key() -> None:
    method = tiny.moco(bn=False)
    move(method.contrast.encoders["a"])
    batch = views()
    student = method.trainable["a"]
    out = method.loss("a", student, method.prepare(batch, BATCH))
    queries, keys = student(batch["global"][0]), method.contrast.encoders["a"](batch["global"][1])
    expected = reference.info_nce(
        queries.detach(), keys, method.contrast.queues["a"].embeddings, 0.2
    )
    assert out["loss"].item() == pytest.approx(expected, abs=1e-5)
    assert out["positive_cosine"].item() == pytest.approx(
        (queries * keys).sum(1).mean().item(), abs=1e-6
    )


def test_the_momentum_encoder_gets_no_gradient_and_the_student_does() -> None:
    method = tiny.moco()
    method.loss("a", method.trainable["a"], method.prepare(views(), BATCH))["loss"].backward()
    assert all(
        p.grad is None and not p.requires_grad for p in method.contrast.encoders["a"].parameters()
    )
    assert all(p.grad is not None for p in method.trainable["a"].parameters())


def test_keys_enter_their_own_students_queue_after_the_step() -> None:
    method = tiny.moco(["a", "b"], bn=False)
    before = {name: queue.embeddings.clone() for name, queue in method.contrast.queues.items()}
    prepared = method.prepare(views(), BATCH)
    for name, student in method.trainable.items():
        method.loss(name, student, prepared)
        assert torch.equal(method.contrast.queues[name].embeddings, before[name])
    keys = {
        name: encoder(views()["global"][1]) for name, encoder in method.contrast.encoders.items()
    }
    method.after_step()
    for name, queue in method.contrast.queues.items():
        torch.testing.assert_close(queue.embeddings[:5], keys[name])
        assert torch.equal(queue.embeddings[5:], before[name][5:])
    assert not torch.equal(keys["a"], keys["b"])


def test_keys_come_from_batch_statistics() -> None:
    method = tiny.moco()
    for module in method.contrast.encoders["a"].modules():
        assert module.training
    running = method.contrast.encoders["a"].state_dict()["encoder.layers.1.running_mean"].clone()
    method.loss("a", method.trainable["a"], method.prepare(views(), BATCH))
    assert not torch.equal(
        method.contrast.encoders["a"].state_dict()["encoder.layers.1.running_mean"], running
    )


def test_all_that_goes_on_is_in_the_checkpoint() -> None:
    method, other = tiny.moco(), tiny.moco()
    method.loss("a", method.trainable["a"], method.prepare(views(), BATCH))
    move(method.trainable["a"])
    method.after_step()
    other.carried.load_state_dict(copy.deepcopy(method.carried.state_dict()))
    tiny.assert_same(
        method.contrast.encoders["a"].state_dict(), other.contrast.encoders["a"].state_dict()
    )
    tiny.assert_same(
        method.contrast.queues["a"].state_dict(), other.contrast.queues["a"].state_dict()
    )
    assert other.contrast.queues["a"].position == 5


def encoder(*, bn: bool) -> Student:
    return tiny.students(bn=bn)["a"]


def keys_here(train: bool, bn: bool) -> tuple[Tensor, Tensor]:
    """Each rank's keys of its part of 6 x world_size images, and its encoder's own embeddings."""
    student = encoder(bn=bn).train(train)
    method = Moco({"a": student}, MocoConfig(queue_size=8), seed=0)
    method.contrast.encoders.train(train)
    size = 6
    mine = views(2 * size)["global"][1][distributed.rank() * size :][:size]
    return method.contrast.keys("a", mine), copy.deepcopy(student)(mine).detach()


@pytest.mark.parametrize("bn", [False, True])
def test_shuffled_keys_come_back_in_their_order(bn: bool, two_ranks: Ranks) -> None:
    for keys, own in two_ranks.run(
        keys_here, False, bn
    ):  # in evaluation mode an embedding depends on its image only
        torch.testing.assert_close(keys, own)


def test_batch_statistics_are_those_of_images_of_all_ranks(two_ranks: Ranks) -> None:
    together = views(12)["global"][1]
    expected = torch.empty(12, tiny.DIM)
    for rank in range(2):
        expected[rank::2] = encoder(bn=True).train()(together[rank::2]).detach()
    for rank, (keys, own) in enumerate(two_ranks.run(keys_here, True, True)):
        torch.testing.assert_close(keys, expected[rank * 6 : rank * 6 + 6])
        assert not torch.allclose(keys, own, atol=1e-3)


def dealt_here(num: int, num_groups: int) -> tuple[Tensor, Tensor]:
    """Images that this rank is dealt, and those that it would take from all ranks' together."""
    rank = distributed.rank()
    mine = views(2 * num)["global"][1][rank * num :][:num].to(memory_format=torch.channels_last)
    dealt = torch.argsort(torch.arange(2 * num) % num_groups, stable=True)
    together = distributed.all_gather(mine)
    return dealt_out(mine, num_groups), together[dealt[rank * num :][:num]]


@pytest.mark.parametrize(("num", "num_groups"), [(6, 2), (6, 4), (5, 2), (7, 6), (1, 2)])
def test_images_are_dealt_out_in_turn_to_the_groups(
    num: int, num_groups: int, two_ranks: Ranks
) -> None:
    for dealt, expected in two_ranks.run(dealt_here, num, num_groups):
        assert torch.equal(dealt, expected)
        assert dealt.is_contiguous() == expected.is_contiguous()


def gathered_shapes() -> list[tuple[int, ...]]:
    """Shapes of what a rank sends to all others to make its keys."""
    shapes: list[tuple[int, ...]] = []

    def noted(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return distributed.all_gather(tensor)

    gather, momentum.all_gather = momentum.all_gather, noted
    try:
        keys_here(True, True)
    finally:
        momentum.all_gather = gather
    return shapes


def test_no_rank_gets_all_views(two_ranks: Ranks) -> None:
    assert two_ranks.run(gathered_shapes) == [[(6, tiny.DIM)]] * 2
