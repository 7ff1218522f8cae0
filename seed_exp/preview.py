"""A picture of a recipe: original images in the left column, beside each its views as the networks see them.

python -m seed_exp.preview views=swav_multicrop                              images: the folder in SEED_DATA
python -m seed_exp.preview views=digits data=digits output=digits.png
"""

from __future__ import annotations

from pathlib import Path

from seed_exp.config.command import command
from seed_exp.config.schema import PreviewConfig
from seed_exp.data.sources import load_source
from seed_exp.reporting.gallery import recipe_gallery
from seed_exp.views.recipe import TrainViews


def preview(config: PreviewConfig) -> None:
    """Writes the picture."""
    source, views = load_source(config.data, "train"), TrainViews(config.views, config.seed)
    recipe_gallery(source, views, Path(config.output), num_images=config.num_images, epoch=config.epoch)
    print(f"written to {config.output}")


main = command(preview)

if __name__ == "__main__":
    main()
