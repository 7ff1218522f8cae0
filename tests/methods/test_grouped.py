"""Batch norm by groups: outputs, gradients, running statistics, and who is in a group with whom."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from ranks import Ranks
from torch import Tensor, nn

from seed_exp.config.schema import MocoConfig
from seed_exp.engine import distributed
from seed_exp.methods.grouped import forward_in_groups, number_of_groups
from seed_exp.methods.moco import Moco
from seed_exp.models.students import Student


def images(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Norm(nn.Module):
    """Batch norm of one number per channel, whose formula fits into a line."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=0.3)

    def forward(self, views: Tensor) -> Tensor:
        out: Tensor = self.norm(views.mean((2, 3)))
        return out


def test_each_group_is_normalised_by_its_own_statistics() -> None:
    views = images(7)
    out = forward_in_groups(Norm(), views, 3)  # groups of 4 and 3
    expected = []
    for group in (views[:4], views[4:]):
        numbers = group.double().mean((2, 3))
        variance = numbers.var(0, unbiased=False)
        expected.append((numbers - numbers.mean(0)) / (variance + 1e-5).sqrt())
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_running_statistics_move_once_to_the_mean_of_the_groups() -> None:
    network = Norm()
    network.norm.running_mean.uniform_(-1, 1)
    before = copy.deepcopy(network.norm)
    numbers = images(8).mean((2, 3))
    forward_in_groups(network, images(8), 2)
    groups = numbers.split(2)
    mean = torch.stack([group.mean(0) for group in groups]).mean(0)
    variance = torch.stack([group.var(0) for group in groups]).mean(0)
    torch.testing.assert_close(
        network.norm.running_mean, 0.7 * before.running_mean + 0.3 * mean, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        network.norm.running_var, 0.7 * before.running_var + 0.3 * variance, rtol=1e-5, atol=1e-6
    )
    assert network.norm.num_batches_tracked == 1


def test_gradients_are_those_of_the_groups_one_by_one() -> None:
    network, twin = (tiny.students(bn=True)["a"] for _ in range(2))
    weights = torch.randn(8, tiny.DIM, generator=torch.Generator().manual_seed(1))
    (forward_in_groups(network, images(8), 4) * weights).sum().backward()
    for group, weight in zip(images(8).split(4), weights.split(4), strict=True):
        (twin(group) * weight).sum().backward()  # adds up
    for (name, one), two in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("num", "size", "groups"), [(64, 32, 2), (31, 32, 1), (63, 32, 1), (8, None, 1)]
)
def test_no_group_is_smaller_than_its_size(num: int, size: int | None, groups: int) -> None:
    assert number_of_groups(num, size) == groups


def moco(bn_group_size: int | None) -> Moco:
    return Moco(
        {"a": tiny.students(bn=True)["a"]},
        MocoConfig(queue_size=8, bn_group_size=bn_group_size),
        seed=0,
    )


def expected_keys(student: Student, together: Tensor, num_groups: int) -> Tensor:
    """Keys of images that are dealt out to groups in turn, one group after the other."""
    keys = torch.empty(len(together), tiny.DIM)
    for number in range(num_groups):
        keys[number::num_groups] = (
            copy.deepcopy(student).train()(together[number::num_groups]).detach()
        )
    return keys


def test_in_one_process_the_images_of_a_query_group_are_dealt_out_to_all_key_groups() -> None:
    method = moco(4)
    keys = method.contrast.keys("a", images(12))
    torch.testing.assert_close(keys, expected_keys(tiny.students(bn=True)["a"], images(12), 3))
    alone = moco(None).contrast.keys("a", images(12))
    assert not torch.allclose(keys, alone, atol=1e-3)


def keys_of_a_rank() -> Tensor:
    own = slice(distributed.rank() * 6, distributed.rank() * 6 + 6)
    return moco(3).contrast.keys("a", images(12)[own])


def test_the_keys_do_not_depend_on_the_number_of_processes(two_ranks: Ranks) -> None:
    together = moco(3).contrast.keys("a", images(12))
    torch.testing.assert_close(torch.cat(two_ranks.run(keys_of_a_rank)), together)


def test_momentum_encoders_are_in_training_mode_whatever_the_students_are_in() -> None:
    students = {"a": tiny.students(bn=True)["a"].eval()}
    method = Moco(students, MocoConfig(queue_size=8), seed=0)
    assert all(
        module.training
        for module in method.contrast.encoders.modules()
        if isinstance(module, nn.BatchNorm2d)
    )
