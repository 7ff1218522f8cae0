from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from seed_exp.config.schema import CropConfig, ViewsConfig
from seed_exp.views.recipe import EvalViews, TrainViews

FILES = sorted((Path(__file__).parents[2] / "conf" / "views").glob("*.yaml"))
ALL_VIEWS_DIFFER = {"mocov1", "mocov2", "simclr", "swav", "swav_multicrop", "weak"}


def load(file: Path) -> ViewsConfig:
    options = yaml.safe_load(file.read_text())
    return ViewsConfig(
        **{
            **options,
            "crops": {name: CropConfig(**crop) for name, crop in options["crops"].items()},
        }
    )


def test_the_published_recipes_are_there() -> None:
    assert {file.stem for file in FILES} >= ALL_VIEWS_DIFFER | {"linear", "digits", "linear_digits"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_says_where_it_is_from_and_makes_views(file: Path) -> None:
    assert file.read_text().startswith("# ")
    config = load(file)
    assert config.name == file.stem
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    labels, indices = np.array([0]), np.array([3])
    views = TrainViews(config, seed=0)
    batch = views.empty(1)
    views.host([image], labels, 0, indices, batch)
    out = views.device(batch)
    assert {name: value.shape for name, value in out.items()} == {
        name: (crop.num, 1, 3, crop.size, crop.size) for name, crop in config.crops.items()
    }
    evaluation = EvalViews(config)
    size = config.eval_size
    batch = evaluation.empty(1)
    evaluation.host([image], labels, 0, indices, batch)
    assert evaluation.device(batch)["global"].shape == (1, 1, 3, size, size)


@pytest.mark.parametrize(
    ("name", "crops", "jitter", "probabilities"),
    [
        ("mocov2", {"global": (224, 1, [0.2, 1])}, [0.4, 0.4, 0.4, 0.1], (0.8, 0.2, 0.5, 0.5)),
        ("mocov1", {"global": (224, 1, [0.2, 1])}, [0.4, 0.4, 0.4, 0.4], (1.0, 0.2, 0.0, 0.5)),
        ("simclr", {"global": (224, 1, [0.08, 1])}, [0.8, 0.8, 0.8, 0.2], (0.8, 0.2, 0.5, 0.5)),
        ("swav", {"global": (224, 1, [0.14, 1])}, [0.4, 0.4, 0.4, 0.1], (0.8, 0.2, 0.5, 0.5)),
        (
            "swav_multicrop",
            {"global": (224, 1, [0.14, 1]), "local": (96, 6, [0.05, 0.14])},
            [0.4, 0.4, 0.4, 0.1],
            (0.8, 0.2, 0.5, 0.5),
        ),
        ("weak", {"global": (224, 1, [0.2, 1])}, [0, 0, 0, 0], (0, 0, 0, 0.5)),
        ("linear", {"global": (224, 1, [0.08, 1])}, [0, 0, 0, 0], (0, 0, 0, 0.5)),
    ],
)
def test_published_recipes_have_the_published_values(
    name: str,
    crops: dict[str, tuple[int, int, list[float]]],
    jitter: list[float],
    probabilities: tuple[float, float, float, float],
) -> None:
    config = load(FILES[0].with_name(f"{name}.yaml"))
    assert {key: (crop.size, crop.num, crop.scale) for key, crop in config.crops.items()} == crops
    assert config.jitter == jitter
    assert (
        config.jitter_prob,
        config.grayscale_prob,
        config.blur_prob,
        config.flip_prob,
    ) == probabilities
    assert config.grayscale_first == (name == "mocov1")
    assert config.blur_sigma == [0.1, 2.0]
    assert (config.eval_resize, config.eval_size) == (256, 224)
