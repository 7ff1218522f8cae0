"""The map shows where the features lie, the same for the same features, whatever they are."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from seed_exp.reporting.embedding_map import embedding_map


@pytest.mark.parametrize(
    ("features", "num_classes"),
    [
        (torch.randn(50, 8), 3),
        (torch.randn(50, 8), 20),
        (torch.ones(50, 8), 3),
        (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 2),
    ],
    ids=["few classes", "more classes than hues", "collapsed", "two images"],
)
def test_it_is_drawn_of_any_features_and_the_same_again(
    features: torch.Tensor, num_classes: int, tmp_path: Path
) -> None:
    labels = torch.arange(len(features)) % num_classes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("first", "again"):
            embedding_map(features, labels, "student", tmp_path / f"{name}.png")
    first = Image.open(tmp_path / "first.png")
    assert first.size == (800, 800)
    assert first.tobytes() == Image.open(tmp_path / "again.png").tobytes()


def test_classes_that_lie_apart_are_seen_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    corners = torch.eye(3).repeat_interleave(30, 0) + 0.01 * torch.randn(90, 3)
    embedding_map(corners, torch.arange(90) // 30, "student", tmp_path / "map.png")
    picture = torch.frombuffer(
        bytearray(Image.open(tmp_path / "map.png").convert("RGB").tobytes()), dtype=torch.uint8
    ).view(800, 800, 3)
    places = []
    for hue in ((0x4E, 0x79, 0xA7), (0xF2, 0x8E, 0x2B), (0xE1, 0x57, 0x59)):
        found = (picture == torch.tensor(hue, dtype=torch.uint8)).all(-1).nonzero().float()
        places.append(found.median(0).values)
    distances = torch.cdist(torch.stack(places), torch.stack(places))
    assert distances[~torch.eye(3, dtype=torch.bool)].min() > 200
