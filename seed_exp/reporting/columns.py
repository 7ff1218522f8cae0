"""Columns of a table: its settings, each under the shortest name that tells them apart."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seed_exp.reporting.entries import NO_TEACHER, Setting, key_of
from seed_exp.reporting.published import short_fingerprint

NAMES = ("teacher", "objective.name", "views.name", "data.source")
"""Options that stand for others that change with them, best first."""


@dataclass(frozen=True)
class TableColumn:
    """A setting of a table."""

    label: str
    """Name of the setting in the table."""
    options: Mapping[str, Any]
    """Options that vary in the table, with their values in this setting."""


def columns_of(settings: Sequence[Setting]) -> dict[str, TableColumn]:
    """Key of a setting -> its column.

    Options that always change together are named by one of them.
    """
    distinct = {key_of(setting): setting for setting in settings}
    keys = sorted({key for setting in distinct.values() for key in setting})
    together: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in keys:
        values = tuple(
            json.dumps(setting.get(key), sort_keys=True, default=str)
            for setting in distinct.values()
        )
        if len(set(values)) > 1:
            first: dict[str, str] = {}
            together[tuple(first.setdefault(value, str(len(first))) for value in values)].append(
                key
            )
    representatives: list[str] = []
    # The settings as the representatives tell them apart.
    apart: list[tuple[str, ...]] = [()] * len(distinct)
    for partition, keys in sorted(
        together.items(), key=lambda item: _rank(min(item[1], key=_rank))
    ):
        finer = [(*before, place) for before, place in zip(apart, partition, strict=True)]
        if len(set(finer)) > len(set(apart)):  # otherwise it follows from those before
            representatives.append(min(keys, key=_rank))
            apart = finer
    varying = [key for keys in together.values() for key in keys]
    columns = {}
    for name, setting in distinct.items():
        present = [key for key in representatives if setting.get(key) is not None]
        label = (
            ", ".join(_labelled(key, setting.get(key)) for key in present or representatives)
            or "all runs"
        )
        columns[name] = TableColumn(label, {key: setting.get(key) for key in varying})
    return columns


def _rank(key: str) -> tuple[int, int, str]:
    if key in NAMES:
        return NAMES.index(key), len(key), key
    unnamed = 0 if key.endswith(".name") else 1
    of_teacher = 2 if key.startswith("teacher's ") else 0
    return len(NAMES) + unnamed + of_teacher, len(key), key


def _labelled(key: str, value: Any) -> str:
    if key == "teacher" and value == NO_TEACHER:
        return NO_TEACHER
    if key == "images":  # the hash tells images of the same name apart
        value = f"{short_fingerprint(value)} #{str(value)[-16:][:4]}"
    return f"{key.removesuffix('.name')} {'–' if value is None else value}"
