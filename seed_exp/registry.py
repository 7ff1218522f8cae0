"""Look-up by name with an error that helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the closest known one, if any is close, and the list."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {matches[0]!r}? " if matches else ""
    return f"{hint}Known: {', '.join(names)}"


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    """The entry `name` of `registry`.

    Raises:
        ValueError: no such entry; names the closest one and lists all.
    """
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; {closest(name, registry)}")
    return registry[name]
