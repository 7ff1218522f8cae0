"""Write the features of all images of a source into one file.

  python -m seed_exp.embed run=runs/distill/NAME
      # writes features.parquet, of the images of the run
  python -m seed_exp.embed run=student.safetensors data=image_folder \\
      data.root=PHOTOS output=photos.npz dtype=float16
  python -m seed_exp.embed ... gallery=neighbours.html 'query=[holiday.jpg]'
      # images that resemble this one
  python -m seed_exp.embed ... gallery=neighbours.html duplicates=0.95
      # near-duplicates
  torchrun --nproc-per-node=8 -m seed_exp.embed ...

Each feature stands with its image's name; the images need no labels. Parquet is
written part by part: there may be more features than memory. A gallery and
duplicates need all features at once. Parquet needs
pip install 'seed_exp[export]'.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import EmbedConfig
from seed_exp.python.callable_module import make_callable


def embed(config: EmbedConfig) -> None:
    """Writes the features."""
    # Late: --help and errors of options need no torch.
    from seed_exp.tools.embed import embed as run

    run(config)


main = command("embed", embed, __doc__)
make_callable(__name__)

if __name__ == "__main__":
    main()
