"""Libraries that only some options need; extras of the package install them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def optional(option: str, extra: str = "export") -> Iterator[None]:
    """Wraps an import: if the library is missing, the error says how to install it.

    Args:
        option: Option that needs the library, for the message.
        extra: Extra of this package that installs it.

    Raises:
        ValueError: the library is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(option, error.name, extra) from None


def require_library(library: str, option: str, extra: str) -> None:
    """Checks that a library is installed, without its import; arguments and error as `optional`."""
    if importlib.util.find_spec(library) is None:
        raise _missing(option, library, extra)


def _missing(option: str, library: str | None, extra: str) -> ValueError:
    return ValueError(
        f"{option} needs {library}, which is not installed; pip install 'seed_exp[{extra}]'"
    )
