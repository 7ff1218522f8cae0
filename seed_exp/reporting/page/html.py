"""HTML and SVG elements, whose text is escaped."""

from __future__ import annotations

import html
from typing import Any

VOID = frozenset({"meta", "input", "img", "br"})
"""Elements that have no content and no end tag."""


class Html(str):
    """Markup that needs no escaping, unlike a plain string."""

    __slots__ = ()


def tag(name: str, /, *children: str | Html, **attributes: Any) -> Html:
    """Returns an element; text among its children and all attributes are escaped.

    An attribute that is None or False is left out, and True is written without a value. `class_`
    stands for `class`; an underscore within a name stands for a hyphen.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(
        f"<{name}{written}>" if name in VOID else f"<{name}{written}>{join(*children)}</{name}>"
    )


def join(*parts: str | Html) -> Html:
    """Returns the parts one after the other, with text escaped."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))
