"""Functions of the user's by their place, module:function, on Python's import path."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any


def function_at(place: str, given: str) -> Any:
    """The function, or whatever can be called, at a place; its module is imported and so runs.

    Args:
        place: module:function, from the user's own options or environment and from no file.
        given: The option that named it, for errors.

    Raises:
        ValueError: there is no such module or function, or the module raises.
    """
    name, _, attribute = place.partition(":")
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{given}: no module named {error.name!r}; expected module:function on Python's import "
            f"path, e.g. PYTHONPATH={Path.cwd()}"
        ) from error
    except Exception as error:  # whatever the code of others raises
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{given}: module {name} raises {type(error).__name__} when it is imported: {reason}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = "has no function" if function is None else f"has a {type(function).__name__} called"
        raise ValueError(f"{given}: {name} {found} {attribute!r}; expected module:function")
    return function
