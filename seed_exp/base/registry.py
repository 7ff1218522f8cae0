"""Look-up by name with an error that helps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar, cast

from seed_exp.base.plugins import Plugin, plugins

T = TypeVar("T")


class Registry(MutableMapping[str, T]):
    """Entries by name: those of this package and, looked up when asked for, those of plug-ins.

    Args:
        name: Its name, under which plug-ins have theirs.
        own: The entries of this package.

    Raises:
        ValueError: on any access, if a plug-in names what exists.
    """

    def __init__(self, name: str, own: dict[str, T]) -> None:
        self._name, self._own = name, own

    def __getitem__(self, name: str) -> T:
        if plugin := self._added().get(name):
            return cast("T", plugin.entry(self._name, name))
        return self._own[name]

    def __setitem__(self, name: str, entry: T) -> None:
        self._own[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._own, *self._added()])

    def __contains__(self, name: object) -> bool:  # without importing the entry
        return name in self._own or name in self._added()

    def __len__(self) -> int:
        return len(self._own) + len(self._added())

    def _added(self) -> dict[str, Plugin]:
        """The plug-ins by the names that they add."""
        added: dict[str, Plugin] = {}
        for plugin in plugins():
            for name in plugin.entries(self._name):
                refuse_second(plugin, f"{self._name}[{name!r}]", name in self._own, added.get(name))
                added[name] = plugin
        return added


def refuse_second(plugin: Plugin, what: str, is_ours: bool, other: Any) -> None:
    """Refuses a name of a plug-in that exists.

    Args:
        plugin: The plug-in.
        what: What it adds.
        is_ours: Whether this package has it.
        other: The plug-in that has it; None = no other.

    Raises:
        ValueError: it exists.
    """
    if is_ours or other is not None:
        raise ValueError(
            f"{plugin} adds {what}, which {'seed_exp' if is_ours else other} has already; "
            "rename one of them"
        )


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
