"""Draw a recipe: original images, and beside each its views.

  python -m seed_exp.preview views=swav_multicrop
      # images: the folder in SEED_DATA
  python -m seed_exp.preview views=digits data=digits output=digits.png

The left column shows the images, the others the views as the networks see them.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import PreviewConfig


def preview(config: PreviewConfig) -> None:
    """Draws the picture."""
    # Late: --help and errors of options need no torch.
    from seed_exp.tools.preview import preview as run

    run(config)


main = command("preview", preview, __doc__)

if __name__ == "__main__":
    main()
