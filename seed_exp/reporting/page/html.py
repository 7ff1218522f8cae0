"""HTML and SVG whose text is escaped unless it was made here."""

from __future__ import annotations

import html
from typing import Any

VOID = frozenset({"meta", "input", "img", "br"})


class Html(str):
    """Markup, as opposed to text."""

    __slots__ = ()


def tag(name: str, /, *children: str | Html, **attributes: Any) -> Html:
    """An element: text among its children is escaped, as are all attributes.

    An attribute that is None or False is left out, True is written without a value; `class_` stands for `class`, and other
    underscores for hyphens.
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
    """One after the other, text escaped."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))
