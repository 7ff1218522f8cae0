"""Look-up by name with an error that helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def suggestion(name: str, known: Iterable[str]) -> str:
    """A question whether the closest known name was meant, then a space; empty if none is close."""
    matches = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}? " if matches else ""


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the closest known name, if any, and the list."""
    names = sorted(known)
    return f"{suggestion(name, names)}Known: {', '.join(names)}"


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    """The entry `name` of `registry`.

    Raises:
        ValueError: no such entry; names the closest one and lists all.
    """
    if name not in registry:
        raise ValueError(f"unknown {kind} {name!r}; {closest(name, registry)}")
    return registry[name]
