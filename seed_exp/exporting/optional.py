"""Imports of libraries that only `export` and `embed` need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def optional(option: str) -> Iterator[None]:
    """Wraps an import: if the library is missing, the error says how to install it.

    Args:
        option: Option that needs the library, for the message.

    Raises:
        ValueError: the library is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option} needs {error.name}, which is not installed; pip install 'seed_exp[export]'"
        ) from None
