"""Words of a command line, as Hydra reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import OverrideParseException

_IN_ARGS = re.compile(r"students\.[^.=]+\.args[.=]")


def word(key: str, value: Any) -> str:
    """`KEY=VALUE` for a plain value; a shell may need more quotes around it (shlex)."""
    return f"{key}={value_of_word(value)}"


def value_of_word(value: Any) -> str:
    """A plain value as it is written on a command line, quoted only where Hydra needs it."""
    if isinstance(value, list):
        return f"[{','.join(map(value_of_word, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    return value if _is_read_back(value) else QuotedString(value, Quote.double).with_quotes()


def with_open_args(words: Iterable[str]) -> list[str]:
    """The words, with ++ before options in students.NAME.args, whose names Hydra cannot know."""
    return [f"++{word}" if _IN_ARGS.match(word) else word for word in words]


def _is_read_back(text: str) -> bool:
    """Whether Hydra reads the text without quotes as this text, alone and in a list."""
    try:
        alone, listed = OverridesParser.create().parse_overrides([f"k={text}", f"k=[{text},0]"])
    except OverrideParseException:
        return False
    return bool(alone.value() == text and listed.value() == [text, 0])
