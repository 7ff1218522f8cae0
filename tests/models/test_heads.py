"""Projection heads, built by width and found from the keys of a file."""

from __future__ import annotations

import pytest
from torch import nn

from seed_exp.models.heads import head_from_keys, head_layers, projection_head


@pytest.mark.parametrize(("hidden_dim", "hidden"), [(None, 6), (20, 20)])
def test_hidden_width_null_is_the_feature_width(hidden_dim: int | None, hidden: int) -> None:
    head = projection_head(6, hidden_dim, 4)
    assert [tuple(layer.weight.shape) for layer in (head[0], head[2])] == [(hidden, 6), (4, hidden)]
    assert head_layers(head) == "Linear-ReLU-Linear"


def test_hidden_width_0_is_one_linear_layer() -> None:
    head = projection_head(6, 0, 4)
    assert head_layers(head) == "Linear"
    assert tuple(head[0].weight.shape) == (4, 6)


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(5, 3),
        nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)),
        nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3)),
    ],
)
def test_a_head_is_found_again_from_its_keys(head: nn.Module) -> None:
    found = head_from_keys(head.state_dict())
    assert head_layers(found) == head_layers(head)
    found.load_state_dict(head.state_dict())


def test_keys_of_no_head_give_no_layer() -> None:
    assert head_layers(head_from_keys({})) == ""
