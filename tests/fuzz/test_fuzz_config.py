"""Whatever is written behind a command: a typed config, or one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from fuzzing import assert_ours, fuzz
from hydra.errors import HydraException
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from seed_exp.config.compose import compose, groups
from seed_exp.config.errors import explain, is_for_user
from seed_exp.config.options import flatten, to_plain
from seed_exp.config.schema import SCHEMAS

VALID = {"bench": "loss", "to": "tsv"}
"""Values of options that a command cannot do without, where not every word will do."""


def required(command: str) -> list[str]:
    """Options that a command cannot do without."""
    given: list[str] = []
    while True:
        try:
            compose(command, given)
        except ValueError as error:
            missing = re.match(r"missing option (\w+):", str(error))
            if missing is None:
                raise
            given.append(f"{missing[1]}={VALID.get(missing[1], 'x')}")
        else:
            return given


REQUIRED = {command: required(command) for command in SCHEMAS}
OPTIONS = {
    command: sorted(flatten(to_plain(compose(command, given))))
    for command, given in REQUIRED.items()
}
"""Every option of every command, those of nested groups as optimizer.lr."""
PARENTS = {
    command: sorted({key.rpartition(".")[0] for key in keys} - {"", *groups()})
    for command, keys in OPTIONS.items()
}

NUMBERS = (
    st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.sampled_from([0.5, 1.0, 2**31, 2**63, 2**64, 1e308, 5e-324])
)
WORDS = st.sampled_from(
    [
        *(
            "null",
            "true",
            "''",
            "auto",
            "cpu",
            "nan",
            "inf",
            "-inf",
            "1e999",
            "???",
            "0x10",
            "1_000",
            "-0",
            "résumé",
            "a b",
            "'a\nb'",
        ),
        *(
            "[]",
            "{}",
            "[[]]",
            "[null]",
            "{global:{}}",
            "{a:1}",
            "${seed}",
            "${no.such}",
            "${oc.env:NOT_SET}",
            "${",
            "\\",
            "\0",
        ),
    ]
)


def shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{shown(inner)}' for key, inner in value.items())}}}"
    return str(value)


VALUES = st.recursive(
    NUMBERS | WORDS | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abglo", min_size=1, max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
).map(shown)


NAMES = st.sampled_from([option for options in groups().values() for option in options]) | st.text(
    "abr_18", min_size=1
)
CHOICES = NAMES | st.lists(NAMES, max_size=3).map(shown)


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command and one to three overrides: mostly of options that exist, with any values."""
    command = draw(st.sampled_from(sorted(SCHEMAS)))
    keys = st.sampled_from(OPTIONS[command]) | st.sampled_from(OPTIONS[command] + PARENTS[command])
    known = st.builds("{}{}={}".format, st.sampled_from(["", "", "", "+", "++"]), keys, VALUES)
    chosen = st.builds("{}={}".format, st.sampled_from(sorted(groups())), CHOICES)
    deleted = st.builds("~{}".format, keys)
    return command, draw(
        st.lists(
            known | known | known | chosen | deleted | st.text(max_size=8), min_size=1, max_size=3
        )
    )


def check(command: str, overrides: list[str]) -> Any:
    """The typed config, or None after an error that the command shows as one line.

    Raises any other error.
    """
    try:
        config = compose(command, [*REQUIRED[command], *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        assert_ours(ValueError(explain(error)))
        return None
    except ValueError as error:
        if not is_for_user(error):
            raise
        assert_ours(error)
        return None
    assert type(config) is SCHEMAS[command]
    return config


def numbers(config: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if dataclasses.is_dataclass(config):
        config = vars(config)
    if isinstance(config, dict | list):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from numbers(value, f"{name}.{key}")
    elif isinstance(config, float):
        yield name, config


@fuzz(40, line=lines())
def test_any_line_gives_a_typed_config_without_nan_or_one_line(line: tuple[str, list[str]]) -> None:
    config = check(*line)
    assert [name for name, value in numbers(config) if math.isnan(value)] == []


def test_lines_that_are_right_give_a_config() -> None:
    for command in SCHEMAS:
        assert check(command, []) is not None
    assert check("distill", ["epochs=3", "optimizer.lr=0.5"]).epochs == 3
