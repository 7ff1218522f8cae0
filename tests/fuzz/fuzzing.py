"""The frame of this folder's property tests.

A short run by default, a long one when asked, and damage to valid bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Property = Callable[..., None]

PROPERTIES: dict[str, Property] = {}
"""Every property by name; test_fuzz_long.py calls them for minutes, with examples of a seed."""


def fuzz(num: int, **arguments: SearchStrategy[Any]) -> Callable[[Property], Property]:
    """Turns a function into a test of `num` examples, and registers it for the long run.

    The examples are the same in every run.
    """

    def decorate(check: Property) -> Property:
        PROPERTIES[check.__name__] = settings(max_examples=100, derandomize=False, deadline=None)(
            given(**arguments)(check)
        )
        return settings(max_examples=num, derandomize=True, database=None, deadline=None)(
            given(**arguments)(check)
        )

    return decorate


_EXTREME = [
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x80\0\0\0",
    b"\n",
    b"\t",
    b"\r\n",
    b"-1",
]


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` after 1 to 4 accidents: bytes changed, removed, put in, zeroed, repeated, cut off."""
    data = whole
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(
            len(data),
            start + draw(st.integers(0, 8) | st.integers(0, len(data)) | st.just(len(data))),
        )
        part = data[start:end]
        changed = st.integers(1, 255).map(
            lambda bits, part=part: bytes(byte ^ bits for byte in part)
        )
        made = st.sampled_from([b"", bytes(len(part)), 2 * part, *_EXTREME]) | st.binary(max_size=8)
        data = data[:start] + draw(changed | made) + data[end:]
    return data


def assert_ours(error: Exception, name: str = "") -> None:
    """The error is one line that says something and names what it is about."""
    message = str(error)
    assert message.strip(), repr(error)
    assert len(message.splitlines()) == 1, message
    assert name in message
