"""Images of one source written as another."""

from __future__ import annotations

import logging
from pathlib import Path

from seed_exp.config.schema import ConvertConfig, OnError
from seed_exp.data.bad_samples import BadSamples
from seed_exp.data.sources import load_source
from seed_exp.data.writers import Shrinking
from seed_exp.data.writers import convert as write


def convert(config: ConvertConfig) -> None:
    """Writes the images and prints where they are."""
    logging.basicConfig(format="%(message)s")
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    source = load_source(config.data, config.split.value)
    on_bad = (
        BadSamples(output, source, config.data.max_bad)
        if config.data.on_error is OnError.skip
        else None
    )
    count = write(
        source,
        config.split.value,
        config.to,
        output,
        shard_size=config.shard_size,
        shrinking=None if config.size is None else Shrinking(config.size, config.quality),
        on_bad=on_bad,
    )
    left_out = (
        f", {len(source) - count} that cannot be read left out" if count < len(source) else ""
    )
    print(f"{count} images{left_out}: data={config.to.value} data.root={config.output}")
