"""An inventory of a source's images, and a list of the bad ones."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np

from seed_exp.base.files import atomic_write
from seed_exp.base.redaction import redact_all
from seed_exp.config.schema import DataConfig, OnError, VerifyConfig
from seed_exp.data.integrity import Inventory, take_inventory
from seed_exp.data.loader import default_num_workers
from seed_exp.data.sources import NoValidationError, Source, Split, load_source


def verify(config: VerifyConfig) -> None:
    """Writes the list of bad images and prints the rest.

    Raises:
        ValueError: some images cannot be read.
    """
    logging.basicConfig(format="%(message)s")
    num_workers = (
        default_num_workers(1) + 1 if config.data.num_workers is None else config.data.num_workers
    )
    # All bad rows are to be listed.
    data = dataclasses.replace(config.data, on_error=OnError.skip)
    entries: list[dict[str, str | int]] = []
    num_images = 0
    for split, source in _sources(data, config.split.value if config.split else None).items():
        inventory = take_inventory(source, num_workers=num_workers)
        num_images += len(source)
        entries += [
            {"split": split, "index": index, "key": source.key(index), "error": error}
            for index, error in inventory.bad.items()
        ]
        print(f"{split}: {describe(inventory)}")
        print(f"  fingerprint: {source.fingerprint()}\n  hash of all content: {inventory.content}")
    with atomic_write(Path(config.output)) as file:
        file.writelines(json.dumps(redact_all(entry)).encode() + b"\n" for entry in entries)
    if entries:
        raise ValueError(
            f"{len(entries)} of {num_images} images cannot be read; {config.output} lists them"
        )


def describe(inventory: Inventory) -> str:
    """A few lines for people."""
    good = len(inventory.sizes)
    lines = [f"{good + len(inventory.bad)} images, {good} good, {len(inventory.bad)} bad"]
    if good:
        for name, values in zip(("height", "width"), inventory.sizes.T, strict=True):
            middle = f"median {np.median(values):.0f}"
            lines.append(f"{name} in pixels: {values.min()} to {values.max()}, {middle}")
        lines.append(f"{inventory.num_copies} have the same bytes as another one")
    if inventory.class_sizes is not None:
        sizes = inventory.class_sizes
        lines.append(f"{len(sizes)} classes of {sizes.min()} to {sizes.max()} images")
    return "\n  ".join(lines)


def _sources(data: DataConfig, split: Split | None) -> dict[str, Source]:
    if split is not None:
        return {split: load_source(data, split)}
    found = {"train": load_source(data, "train")}
    try:
        found["val"] = load_source(data, "val")
    except NoValidationError:
        return found
    return found
