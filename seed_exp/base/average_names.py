"""Names of averages of networks beside the networks' own: NAME_ema is the average of NAME."""

from __future__ import annotations

from collections.abc import Collection, Iterable

SUFFIX = "_ema"


def average_of(name: str) -> str:
    """Name of the network's average."""
    return f"{name}{SUFFIX}"


def network_behind(name: str, trained: Collection[str]) -> str:
    """The trained network of this name, or the one whose average has it; else the name itself."""
    network = name.removesuffix(SUFFIX)
    return network if name not in trained and network in trained else name


def is_average(name: str, names: Collection[str]) -> bool:
    """Whether `name` is that of the average of another one among `names`."""
    return name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in names


def without_averages(names: Collection[str]) -> list[str]:
    """The names without those of averages of others among them."""
    return [name for name in names if not is_average(name, names)]


def with_averages(names: Iterable[str], decay: float | None) -> list[str]:
    """The names, each followed by that of its average if there are averages.

    Args:
        names: Names of networks.
        decay: `ema_decay` of their training; None = no averages.
    """
    if decay is None:
        return list(names)
    return [one for name in names for one in (name, average_of(name))]
