"""Libraries that only export and embed need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def optional(option: str) -> Iterator[None]:
    """Around an import: where the library is missing, `option` needs it and the error says how to install it.

    Raises:
        ValueError: it is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option} needs {error.name}, which is not installed; pip install 'seed_exp[export]'"
        ) from None
