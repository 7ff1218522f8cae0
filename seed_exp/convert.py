"""Convert images between folders of files, TSV and tar shards.

  python -m seed_exp.convert data=image_folder data.root=imagenet to=shards \\
      output=imagenet-shards
  python -m seed_exp.convert data=image_folder data.root=imagenet to=shards \\
      output=imagenet-shards split=val
  python -m seed_exp.convert data=image_folder data.root=imagenet to=shards \\
      output=imagenet-256 size=256
      # shorter side 256 px, as JPEG: a training reads several times faster

Then train with data=shards data.root=imagenet-shards. Each image file stays as
it is, byte for byte, unless `size` makes the image smaller; digits and
torchvision sets become PNG files. Killed at any instant, the same command
completes the result. The result has its name only when it is complete.
"""

from __future__ import annotations

from seed_exp.config.command import command
from seed_exp.config.schema import ConvertConfig


def convert(config: ConvertConfig) -> None:
    """Writes the images in the other format."""
    # Late: --help and errors of options need no torch.
    from seed_exp.tools.convert import convert as run

    run(config)


main = command("convert", convert, __doc__)

if __name__ == "__main__":
    main()
