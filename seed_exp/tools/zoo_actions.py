"""Actions on published weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from seed_exp.base.files import cache_folder
from seed_exp.base.redaction import redact_all
from seed_exp.base.registry import lookup
from seed_exp.base.table import markdown_table
from seed_exp.config.errors import last_words
from seed_exp.models.zoo import cache_state, fetch, num_parameters, verify
from seed_exp.models.zoo_entries import LICENCES, ZooEntry, zoo


def list_all(given: argparse.Namespace) -> None:
    """A line for each entry, or for those with a kind of licence."""
    kinds = _kinds(given.filters)
    entries = [entry for entry in zoo().values() if entry.kind_of_licence in kinds]
    if given.json:
        _print_json([_facts(entry) for entry in entries])
        return
    header = [
        "name",
        "network",
        "method",
        "epochs",
        "top-1",
        "parameters",
        "licence",
        "hash",
        "cache",
    ]
    rows = [
        [
            entry.name,
            entry.network,
            entry.method,
            _known(entry.epochs),
            _known(entry.top1),
            f"{num_parameters(entry) / 1e6:.1f} M",
            _licence(entry),
            _short(entry.hash),
            cache_state(entry),
        ]
        for entry in entries
    ]
    print(markdown_table(header, rows))
    print(
        "\ntop-1: published, linear evaluation on ImageNet-1k, percent. "
        "Addresses, sources and use: zoo show NAME"
    )


def show(given: argparse.Namespace) -> None:
    """All of one entry."""
    facts = _facts(*_named([given.name]))
    if given.json:
        _print_json(facts)
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {_known(value)}")


def fetch_each(given: argparse.Namespace) -> None:
    """Downloads; prints where each file is."""
    _each(
        _named(given.names),
        lambda entry: {"path": str(fetch(entry)), "cache": cache_state(entry)},
        given.json,
    )


def verify_each(given: argparse.Namespace) -> None:
    """Checks; prints what was found in each file."""
    if given.file is not None and len(given.names) != 1:
        raise ValueError(f"--file is one file: give it with one name, got {len(given.names)} names")
    if given.all == bool(given.names):
        raise ValueError("give names or --all")
    here = [entry for entry in zoo().values() if entry.path.exists()]
    if given.all and not here:
        print(f"nothing in the cache {cache_folder()}", file=sys.stderr)
    _each(
        here if given.all else _named(given.names),
        lambda entry: _found(entry, given.file),
        given.json,
    )


ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "list": list_all,
    "show": show,
    "fetch": fetch_each,
    "verify": verify_each,
}


def _each(
    entries: list[ZooEntry], act: Callable[[ZooEntry], dict[str, Any]], as_json: bool
) -> None:
    """Acts on every entry and prints the result.

    An entry that fails does not keep the others from being tried; the exit status is then 1.
    """
    done: dict[str, dict[str, Any]] = {}
    failed = False
    for entry in entries:
        try:
            done[entry.name] = act(entry)
        except (ValueError, OSError) as error:
            if len(entries) == 1:
                raise
            failed = True
            done[entry.name] = {"error": str(error)}
            print(last_words(f"{entry.name}: {error}"), file=sys.stderr)
            continue
        if not as_json:
            print(
                f"{entry.name}: "
                + ", ".join(f"{key} {_known(value)}" for key, value in done[entry.name].items())
            )
    if as_json:
        _print_json(done)
    if failed:
        sys.exit(1)


def _found(entry: ZooEntry, file: Path | None) -> dict[str, Any]:
    found = verify(entry, file)
    return {
        "path": str(found.path),
        "sha256": found.sha256,
        "hash": f"as published ({found.published})" if found.published else "none is published",
        "embeddings": f"finite, {found.embedding_dim} wide",
        **({"doubt": found.doubt} if found.doubt else {}),
    }


def _facts(entry: ZooEntry) -> dict[str, Any]:
    """What is known of an entry, of the machine too; without secrets."""
    facts = asdict(entry) | {
        "parameters": num_parameters(entry),
        "float32_bytes": 4 * num_parameters(entry),
        "forbids_commercial_use": entry.forbids_commercial_use,
        "kind_of_licence": entry.kind_of_licence,
        "path": str(entry.path),
        "cache": cache_state(entry),
    }
    facts["use"] = f"python -m seed_exp.{entry.use}"
    plain: dict[str, Any] = redact_all(facts)
    return plain


def _kinds(filters: list[str]) -> set[str]:
    """The kinds of licences that words such as licence=permissive choose; all for no words."""
    chosen = set()
    for word in filters:
        key, _, kind = word.partition("=")
        if key != "licence" or kind not in LICENCES:
            raise ValueError(
                f"zoo list takes licence={'|'.join(LICENCES)}, several to see all of them; "
                f"got {word}"
            )
        chosen.add(kind)
    return chosen or set(LICENCES)


def _named(names: list[str]) -> list[ZooEntry]:
    entries = zoo()
    return [lookup(entries, name, "entry of the zoo") for name in names]


def _licence(entry: ZooEntry) -> str:
    return f"{_known(entry.licence)}{', non-commercial' if entry.forbids_commercial_use else ''}"


def _short(hash_: str | None) -> str:
    algorithm, _, digits = (hash_ or "").partition(":")
    return f"{algorithm}:{digits[:8]}" if hash_ else "unknown"


def _known(value: Any) -> str:
    return (
        "unknown"
        if value is None
        else f"{value:,}"
        if type(value) is int and value > 9999
        else str(value)
    )


def _print_json(content: Any) -> None:
    print(json.dumps(redact_all(content), indent=2))
