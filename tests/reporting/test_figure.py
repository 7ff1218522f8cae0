from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from seed_exp.reporting import figure
from seed_exp.reporting.figure import overview_figure


def arguments(num_images: int = 40, num_classes: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def images(num: int) -> Tensor:
        return torch.randint(0, 256, (num, 3, 8, 8), dtype=torch.uint8, generator=generator)

    encoders = ("student", "teacher")
    return {
        "losses": {"SEED": ([0, 10, 20], [3.0, 2.0, 1.5]), "MoCo-V2": ([0, 10], [7.0, 6.5])},
        "maps": {
            name: torch.randn(num_images, 5 + i, generator=generator)
            for i, name in enumerate(encoders)
        },
        "labels": torch.arange(num_images) % num_classes,
        "neighbours": {
            name: torch.randint(0, 20, (3, 4), generator=generator) for name in encoders
        },
        "query_images": images(3),
        "query_labels": torch.arange(3),
        "bank_images": images(20),
        "bank_labels": torch.arange(20) % 3,
    }


def test_the_picture_is_1600_x_900_on_white_and_the_same_every_time(tmp_path: Path) -> None:
    pixels = []
    for name in ("a.png", "new/b.png"):
        overview_figure(
            tmp_path / name, **arguments(), class_names=["cat", "dog", "owl"], title="A title"
        )
        pixels.append(np.asarray(Image.open(tmp_path / name).convert("RGB")))
    assert pixels[0].shape == (900, 1600, 3)
    assert (pixels[0][:10] == 255).all()
    assert np.array_equal(*pixels)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.png", "b.png"]


def test_few_images_and_many_classes_are_drawn(tmp_path: Path) -> None:
    overview_figure(tmp_path / "few.png", **arguments(num_images=4))
    overview_figure(tmp_path / "many.png", **arguments(num_images=30, num_classes=30))
    assert (tmp_path / "few.png").stat().st_size > 10_000
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_at_most_max_points_are_projected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "MAX_POINTS", 12)
    sizes: list[int] = []

    def project(features: Tensor) -> np.ndarray[Any, Any]:
        sizes.append(len(features))
        return np.zeros((len(features), 2))

    monkeypatch.setattr(figure, "_project", project)
    overview_figure(tmp_path / "a.png", **arguments())
    assert sizes == [12, 12]


def test_the_map_keeps_separate_clusters_apart() -> None:
    labels = torch.arange(60) % 2
    features = torch.nn.functional.one_hot(labels, 2).float() + 0.05 * torch.randn(
        60, 2, generator=torch.Generator().manual_seed(0)
    )
    points = torch.from_numpy(figure._project(features))
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert torch.equal(labels[distances.argmin(1)], labels)


def test_frames_say_whether_the_label_agrees_and_images_are_unchanged() -> None:
    queries = torch.full((1, 3, 64, 64), 51, dtype=torch.uint8)
    neighbours = torch.stack(
        [torch.full((3, 64, 64), value, dtype=torch.uint8) for value in (102, 204)]
    )[None]
    picture = figure._gallery(queries, neighbours, torch.tensor([[True, False]]))
    middle = picture[picture.shape[0] // 2]
    first = middle[0], middle[34]
    assert np.allclose(first[0], 1)  # the query has no coloured frame
    assert np.allclose(first[1], 0.2)
    rows, rest = picture.shape[0], middle[80:]
    assert rows == 64 + 2 * 4
    colours = [tuple(np.round(colour, 3)) for colour in rest]
    expected = [figure.to_rgb(figure.SAME), (0.4,) * 3, figure.to_rgb(figure.OTHER), (0.8,) * 3]
    positions = [colours.index(tuple(np.round(np.float32(colour), 3))) for colour in expected]
    assert positions[0] < positions[1] < positions[2] < positions[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": {}}, "at least one run"),
        ({"maps": {}}, "at least one run and one encoder"),
        ({"neighbours": {}}, r"same encoders in order, got \['student', 'teacher'\] and \[\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "at least 4 images, got 3"),
    ],
)
def test_a_figure_without_content_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        overview_figure(tmp_path / "a.png", **(arguments() | change))
    assert not list(tmp_path.iterdir())
