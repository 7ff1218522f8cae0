"""Features of all images of a folder or another source, in one file with their names; near-duplicates, and neighbours as a page.

  python -m seed_exp.embed run=runs/distill/NAME data=image_folder data.root=PHOTOS                    writes features.parquet
  python -m seed_exp.embed run=student.safetensors data=image_folder data.root=PHOTOS output=photos.npz dtype=float16
  python -m seed_exp.embed ... gallery=neighbours.html 'query=[holiday.jpg]'                           what looks like this one?
  python -m seed_exp.embed ... gallery=neighbours.html duplicates=0.95                                 what is there twice?
  torchrun --nproc-per-node=8 -m seed_exp.embed ...

The images need no labels. Parquet is written part by part, so that there may be more features than memory; a gallery and
duplicates need all of them at once. Parquet needs pip install 'seed_exp[export]'.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import EmbedConfig


def embed(config: EmbedConfig) -> None:
    """Writes the features."""
    from seed_exp.tools.embed import (
        embed as run,
    )  # late: --help and errors of options need no torch

    run(config)


main = command("embed", embed, __doc__)

if __name__ == "__main__":
    main()
