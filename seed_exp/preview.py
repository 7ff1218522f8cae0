"""A picture of a recipe: original images in the left column, beside each its views as the networks see them.

python -m seed_exp.preview views=swav_multicrop                              images: the folder in SEED_DATA
python -m seed_exp.preview views=digits data=digits output=digits.png
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from seed_exp.config.command import command
from seed_exp.config.schema import PreviewConfig
from seed_exp.data.sources import load_source
from seed_exp.evaluation.features import spread
from seed_exp.reporting.gallery import view_gallery
from seed_exp.views.photometric import denormalize
from seed_exp.views.recipe import TrainViews


def preview(config: PreviewConfig) -> None:
    """Writes the picture."""
    source = load_source(config.data, "train")
    indices = spread(len(source), config.num_images)
    images = [source.image(index) for index in indices.tolist()]
    views = TrainViews(config.views, config.seed)
    batch = views.empty(len(images))
    views.host(images, np.full(len(images), -1), config.epoch, indices, batch)
    made = views.device(batch)
    view_gallery(images, {name: denormalize(view, config.views) for name, view in made.items()}, Path(config.output))
    print(f"written to {config.output}")


main = command(preview)

if __name__ == "__main__":
    main()
