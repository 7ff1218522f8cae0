"""Reference checkpoints for the tests of the models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def fill(shared: Path) -> ModuleType:
    """The module that rebuilds the reference checkpoints from their lists of keys."""
    spec = importlib.util.spec_from_file_location("fill", shared / "fixtures" / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
