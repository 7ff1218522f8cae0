"""Converts images between folders of files, TSV and tar shards; each image file stays as it is, byte for byte.

python -m seed_exp.convert data=image_folder data.root=imagenet to=shards output=imagenet-shards
python -m seed_exp.convert data=image_folder data.root=imagenet to=shards output=imagenet-shards split=val

Then train with data=shards data.root=imagenet-shards. Killed at any instant, the same command completes the result, which has its
name only when it is complete. Digits and torchvision sets become PNG files.
"""

from __future__ import annotations

import logging
from pathlib import Path

from seed_exp.config.command import command
from seed_exp.config.schema import ConvertConfig, OnError
from seed_exp.data.bad_samples import BadSamples
from seed_exp.data.sources import load_source
from seed_exp.data.writers import convert as write


def convert(config: ConvertConfig) -> None:
    """Writes the images and prints where they are."""
    logging.basicConfig(format="%(message)s")
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    source = load_source(config.data, config.split.value)
    on_bad = BadSamples(output, source, config.data.max_bad) if config.data.on_error is OnError.skip else None
    count = write(source, config.split.value, config.to, output, shard_size=config.shard_size, on_bad=on_bad)
    left_out = f", {len(source) - count} that cannot be read left out" if count < len(source) else ""
    print(f"{count} images{left_out}: data={config.to.value} data.root={config.output}")


main = command(convert)

if __name__ == "__main__":
    main()
