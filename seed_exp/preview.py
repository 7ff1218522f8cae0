"""A picture of a recipe: original images in the left column, beside each its views as the networks see them.

python -m seed_exp.preview views=swav_multicrop                              images: the folder in SEED_DATA
python -m seed_exp.preview views=digits data=digits output=digits.png
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import PreviewConfig


def preview(config: PreviewConfig) -> None:
    """Draws the picture."""
    from seed_exp.tools.preview import (
        preview as run,
    )  # late: --help and errors of options need no torch

    run(config)


main = command("preview", preview, __doc__)

if __name__ == "__main__":
    main()
