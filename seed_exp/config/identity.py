"""Whether two runs are the same: by the options in which they differ from first values.

A run folder is named by its options and outlives many versions of this package. So neither a new
option nor a changed default may rename a run, or keep a later version from going on with it. Every
option has a *first value*: the value with which the package does what it did before the option
could be given. The first value is the default in `config.schema`, unless a table below has another,
and it never changes. Then

- an option that a config.json does not know has its first value;
- an option with its first value is not part of a run's name.

Rules for whoever changes an option:

1. New option: let its default reproduce what happened before. Where the default has to be another,
   enter the value that does reproduce it into `CHANGED_DEFAULTS`.
2. Changed default: enter the default from before into `CHANGED_DEFAULTS`. Old runs keep their names
   and go on where that value is given. New runs get other names. A second change of the same
   default leaves the entry as it is.
3. Removed option: enter the values that made no difference into `REMOVED`. Runs with one of these
   go on; runs with another value are refused.
4. Values in conf/ need no entry: whatever differs from the first value is part of the name.

`tests/config/first_values.json` lists the first values, so that no change passes unseen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from omegaconf import MISSING

from seed_exp.base.fingerprints import content_of, is_sampled, same_images, unsampled
from seed_exp.base.redaction import redact_all, unsigned
from seed_exp.config.options import MAY_CHANGE, flatten, to_plain
from seed_exp.config.schema import OBJECTIVE_CONFIGS, SCHEMAS, ObjectiveConfig


class ChangedDefault(NamedTuple):
    """A default that does not reproduce the versions before it."""

    since: str
    """Version that brought the default."""
    before: Any
    """Value that reproduces what versions before it did, as JSON has it."""


class Removed(NamedTuple):
    """An option that config.json files may have, and the package no longer has."""

    since: str
    """First version without the option."""
    harmless: tuple[Any, ...] | None
    """Values with which versions before did what this version does; None = all."""


CHANGED_DEFAULTS: dict[str, ChangedDefault] = {
    "MocoConfig.bn_group_size": ChangedDefault("0.2.0", None),
    "DiscoConfig.bn_group_size": ChangedDefault("0.2.0", None),
    # Without dropout in MobileNetV3-Large and with timm's initialisation.
    "StudentConfig.init_rule": ChangedDefault("0.2.0", "timm"),
    # A run records the number that auto stands for: with as many images it is the same run.
    "ObjectiveConfig.queue_size": ChangedDefault("0.3.0", 65536),
    "MocoConfig.queue_size": ChangedDefault("0.3.0", 65536),
}
"""By class and field in config.schema, such as "FitConfig.max_skipped"; subclasses are included."""

REMOVED: dict[str, Removed] = {
    # Before 0.2.0 every objective had the options of all; those it lacks now it never read.
    **{
        f"objective.{name}": Removed("0.2.0", None)
        for name in (
            *("tau_student", "weight", "bag_size", "num_clusters", "cluster_every", "momentum"),
            "tau_teacher",
        )
    }
}
"""By name as on a command line, with * for names that users choose: "students.*.network".

Consulted only for options that a run's own schemas lack: another objective may still have them.
"""


NARROWER: dict[type[Any], Mapping[str, type[Any]]] = {ObjectiveConfig: OBJECTIVE_CONFIGS}
"""Schemas of a field by the `name` that is recorded in it, where there are several."""


PLACES = ("data.root", "data.val_root")
"""Options that say where images are: they do not count if a fingerprint has the content."""


class _Absent:
    def __str__(self) -> str:
        return "absent"


ABSENT = _Absent()


class Option(NamedTuple):
    """An option of a run; the names in a mapping such as `students` are one, "students.*"."""

    path: str
    first: Any
    """First value; ABSENT for an option that must be given."""
    value: Any
    """ABSENT for an option that must be given and is not."""


def identity(config: Any, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Options that tell a run from others of its command, flattened, and content of its inputs.

    Args:
        config: All options, typed.
        inputs: Fingerprints of what the run reads, by name.
    """
    moved = any(map(is_sampled, inputs.values()))
    options = [
        option
        for option in _options(config, to_plain(config))
        if not (moved and option.path in PLACES)
    ]
    return _told_apart(options, {name: content_of(value) for name, value in inputs.items()})


def identity_before_samples(config: Any, inputs: Mapping[str, str]) -> dict[str, Any]:
    """The same as versions before 0.2.0 had it, with places and names for contents."""
    earlier = {name: unsampled(value) for name, value in inputs.items()}
    return _told_apart(_options(config, to_plain(config)), earlier)


def digest(command: str, identity: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that name the run of `command` with this identity."""
    content = json.dumps([command, identity], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def differences(found: Mapping[str, Any], config: Any, inputs: Mapping[str, str]) -> list[str]:
    """A line for each option or input in which a run differs from the given ones.

    Images that have moved are the same ones where their fingerprint is the same.

    Args:
        found: Content of the run's config.json, whichever version wrote it.
        config: The given options, typed.
        inputs: Fingerprints of the given inputs, by name.
    """
    old = _options(config, found["options"])
    new = _options(config, to_plain(config))
    shared = {option.path for option in old} & {option.path for option in new}
    known = dict(found["inputs"])
    same = {
        name for name, value in inputs.items() if name in known and same_images(known[name], value)
    }
    if any(is_sampled(known[name]) for name in same):
        old, new = ([one for one in options if one.path not in PLACES] for options in (old, new))
    was = _told_apart(old, known | {name: inputs[name] for name in same}, shared)
    now = redact_all(_told_apart(new, inputs, shared))  # config.json is redacted, too
    return [
        f"{path} was {was.get(path, ABSENT)}, now {now.get(path, ABSENT)}"
        for path in sorted(was.keys() | now.keys())
        if was.get(path, ABSENT) != now.get(path, ABSENT)
    ]


def effective_options(command: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A run's decisive options, flattened, as this version would have recorded them.

    Args:
        command: The run's command.
        options: As some version of this package recorded them, nested or flattened.
    """
    return {
        option.path: option.value
        for option in _options(SCHEMAS[command], _nested(options))
        if option.value is not ABSENT and not option.path.endswith(".*")
    }


def first_values(owner: type[Any]) -> dict[str, Any]:
    """{"Class.field": first value} of a schema and those in it, without what must be given."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        home = next(one for one in owner.__mro__ if field.name in inspect.get_annotations(one))
        if (inner := _schema_in(hints[field.name])) is not None:
            values |= first_values(inner)
            for narrower in NARROWER.get(inner, {}).values():
                shared = {one.name for one in dataclasses.fields(inner)}
                own = first_values(narrower).items()
                values |= {key: value for key, value in own if key.split(".")[1] not in shared}
        elif (first := _first(owner, field)) is not ABSENT:
            values[f"{home.__name__}.{field.name}"] = first
    return values


def _options(owner: Any, recorded: Mapping[str, Any]) -> list[Option]:
    """The decisive options of a run.

    Args:
        owner: The schema to read them by, or an instance, whose parts may be of narrower schemas.
        recorded: The options, plain and nested.
    """
    known = list(_walk(owner, recorded, ""))
    paths = {option.path for option in known}
    unknown = [
        Option(path, ABSENT, value)
        for path, value in flatten(dict(recorded)).items()
        if path not in paths and not _made_no_difference(path, value)
    ]
    return [option for option in [*known, *unknown] if option.path not in MAY_CHANGE]


def _told_apart(
    options: Iterable[Option], inputs: Mapping[str, str], always: Collection[str] = ()
) -> dict[str, Any]:
    """The options without those that have their first value, except `always`, and the inputs.

    An address has the same value whichever way it is signed.
    """
    values = {
        option.path: unsigned(option.value) if isinstance(option.value, str) else option.value
        for option in options
        if option.value != option.first or option.path in always
    }
    return values | {f"content of {name}": found for name, found in inputs.items()}


def _walk(
    owner: Any, recorded: Mapping[str, Any], prefix: str, declared: type[Any] | None = None
) -> Iterator[Option]:
    """The options of `owner`; those that `recorded` lacks have their first values.

    `declared` is the schema of the field that holds `owner`, which may be a narrower one.
    """
    schema = owner if isinstance(owner, type) else type(owner)
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        path, value = f"{prefix}{field.name}", recorded.get(field.name, ABSENT)
        own = None if owner is schema else getattr(owner, field.name)
        inner, first = _schema_in(hints[field.name]), _first(schema, field, declared)
        nested = value if isinstance(value, dict) else {}
        if typing.get_origin(hints[field.name]) is dict and inner is not None:
            yield Option(f"{path}.*", sorted(first), sorted(nested))
            for name, entry in nested.items():
                given = own.get(name, inner) if isinstance(own, dict) else inner
                fields = entry if isinstance(entry, dict) else {}
                yield from _walk(given, fields, f"{path}.{name}.", inner)
        elif typing.get_origin(hints[field.name]) is dict:
            pass  # whatever is in it is an option without a first value, like one that is not known
        elif dataclasses.is_dataclass(own):
            yield from _walk(own, nested, f"{path}.", inner)
        elif inner is not None:
            narrower = NARROWER.get(inner, {}).get(nested.get("name", ""), inner)
            yield from _walk(narrower, nested, f"{path}.", inner)
        else:
            yield Option(path, first, first if value is ABSENT else value)


def _schema_in(hint: Any) -> type[Any] | None:
    """The dataclass that a field of this type holds, itself or by name; None for other fields."""
    held = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else hint
    return held if dataclasses.is_dataclass(held) and isinstance(held, type) else None


def _first(
    schema: type[Any], field: dataclasses.Field[Any], declared: type[Any] | None = None
) -> Any:
    """The first value of a field; ABSENT if it must be given.

    A field that `declared` has too takes its default from there, because narrower schemas of the
    same field, such as those of the objectives, are told apart by their defaults.
    """
    for one in schema.__mro__:
        if (change := CHANGED_DEFAULTS.get(f"{one.__name__}.{field.name}")) is not None:
            return change.before
    shared = {one.name: one for one in dataclasses.fields(declared)} if declared else {}
    field = shared.get(field.name, field)
    if field.default_factory is not dataclasses.MISSING:
        return to_plain(field.default_factory())
    return ABSENT if field.default in (MISSING, dataclasses.MISSING) else to_plain(field.default)


def _made_no_difference(path: str, value: Any) -> bool:
    """Whether a run with this option, which the package no longer has, may go on."""
    return any(
        fnmatchcase(path, pattern) and (removed.harmless is None or value in removed.harmless)
        for pattern, removed in REMOVED.items()
    )


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """{"data": {"root": ...}} for {"data.root": ...}; nested options stay as they are."""
    nested: dict[str, Any] = {}
    for path, value in flatten(dict(options)).items():
        *groups, name = path.split(".")
        owner = nested
        for group in groups:
            if not isinstance(owner.get(group), dict):
                owner[group] = {}
            owner = owner[group]
        owner[name] = value
    return nested
