"""Every property of this folder for minutes: SEED_FUZZ_MINUTES of all together, 10 by default.

The examples are the same in every run: more minutes get further.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest
import test_fuzz_checkpoints
import test_fuzz_config
import test_fuzz_images
import test_fuzz_order
import test_fuzz_shards
import test_fuzz_tsv
import test_fuzz_views
from fuzzing import PROPERTIES
from hypothesis import seed

MODULES = [
    test_fuzz_checkpoints,
    test_fuzz_config,
    test_fuzz_images,
    test_fuzz_order,
    test_fuzz_shards,
    test_fuzz_tsv,
    test_fuzz_views,
]
FOLDER = Path(__file__).parent
SECONDS = 60 * float(os.environ.get("SEED_FUZZ_MINUTES", "10")) / len(PROPERTIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROPERTIES)
def test_a_property_holds_for_minutes(name: str) -> None:
    end = time.monotonic() + SECONDS
    for number in itertools.count():
        seed(number)(PROPERTIES[name])()
        if time.monotonic() > end:
            break


def test_every_property_is_run_for_minutes() -> None:
    assert all(
        name in PROPERTIES
        for module in MODULES
        for name, test in vars(module).items()
        if hasattr(test, "hypothesis")
    )
    assert {module.__name__ for module in MODULES} == {
        file.stem for file in FOLDER.glob("test_fuzz_*.py")
    } - {"test_fuzz_long"}
