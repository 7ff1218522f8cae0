"""Data sets of Hugging Face and parquet files that tests write, without a network."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

CLASSES = ["blue", "red"]


def offline(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Gives this process and those that it starts a cache of their own and no network."""
    from huggingface_hub import constants

    places = {"HF_HOME": home, "HF_DATASETS_CACHE": home / "datasets", "HF_HUB_CACHE": home / "hub"}
    for name, place in places.items():
        monkeypatch.setenv(name, str(place))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # They read their variables when they are imported.
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (12, 9, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def made(values: range, **more: Any) -> datasets.Dataset:
    """A data set of labelled images, one for each of `values`."""
    columns = {
        "image": [{"bytes": png(value), "path": None} for value in values],
        "label": [value % 2 for value in values],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    for name, (kind, column) in more.items():
        features[name], columns[name] = kind, column
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def write_parquet(root: Path, num: int = 20) -> Path:
    """A folder in the hub's layout; the last six images are for validation."""
    (root / "data").mkdir(parents=True)
    made(range(num)).to_parquet(root / "data" / "train-00000-of-00001.parquet")
    made(range(num, num + 6)).to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    return root


def put_into_cache(root: Path, owner: str, name: str) -> None:
    """Leaves a data set as a download leaves it in the cache."""
    datasets.load_dataset(str(root))
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    (loaded,) = (cache / root.name).glob("*/0.0.0/*/")
    place = cache / f"{owner}___{name}" / "default" / "0.0.0" / loaded.name
    shutil.copytree(loaded, place)
    for file in place.glob(f"{root.name}-*.arrow"):
        os.rename(file, file.with_name(file.name.replace(root.name, name, 1)))  # noqa: PTH104
