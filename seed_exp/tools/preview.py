"""A picture of a recipe of views."""

from __future__ import annotations

from pathlib import Path

from seed_exp.config.schema import PreviewConfig
from seed_exp.data.sources import load_source
from seed_exp.reporting.image_grids import recipe_gallery
from seed_exp.views.recipe import TrainViews


def preview(config: PreviewConfig) -> None:
    """Writes the picture."""
    source, views = load_source(config.data, "train"), TrainViews(config.views, config.seed)
    recipe_gallery(
        source, views, Path(config.output), num_images=config.num_images, epoch=config.epoch
    )
    print(f"written to {config.output}")
