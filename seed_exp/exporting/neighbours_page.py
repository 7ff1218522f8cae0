"""An HTML page of images beside those that look like them.

It needs no other file, and can be read on a phone and in dark mode.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from seed_exp.base.files import atomic_write
from seed_exp.base.redaction import redact
from seed_exp.reporting.page.html import Html, join, tag

_THUMBNAIL = (240, 180)
"""Largest width and height in pixels: twice the size shown, for screens of high resolution."""
_MAX_SHOWN = 24  # images in a row; nobody looks at all of a thousand copies

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --muted: #667; --page: #fff; --card: #f4f5f7;
        --mark: #0b63c5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --muted: #98a1ad; --page: #14171b; --card: #1f242b; --mark: #6cb2ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 16px; background: var(--page); color: var(--ink);
       font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 4px; }
h2 { font-size: 1.1rem; margin: 32px 0 4px; }
p { margin: 0 0 12px; color: var(--muted); overflow-wrap: anywhere; }
section { display: flex; gap: 12px; padding: 12px 0; border-top: 1px solid var(--card); }
section > figure { flex: 0 0 168px; }
section > div { flex: 1; display: grid; gap: 8px; align-content: start;
                grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); }
figure { margin: 0; background: var(--card); border-radius: 6px; overflow: hidden; min-width: 0;
         align-self: start; }
figure.query { outline: 2px solid var(--mark); }
img { display: block; width: 100%; height: auto; aspect-ratio: 4 / 3; object-fit: contain;
      background: #8882; }
figcaption { padding: 3px 7px 5px; font-size: 0.8rem; }
figcaption b { font-variant-numeric: tabular-nums; }
figcaption span { display: block; color: var(--muted); line-height: 1.25; max-height: 2.5em;
                  overflow: hidden; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  section { display: block; }
  section > figure { max-width: 48%; margin-bottom: 8px; }
  section > div { grid-template-columns: repeat(4, 1fr); gap: 5px; }
  section > div figcaption { padding: 2px 4px 3px; font-size: 0.68rem; }
}
"""


@dataclass(frozen=True)
class Shown:
    """An image on the page."""

    image: Callable[[], Tensor]
    """Returns the pixels, uint8 [3, H, W]; called once."""
    name: str
    """Name of the image, shown below it."""
    label: int = -1
    """Class of the image; -1 = unlabelled."""
    similarity: float | None = None
    """Cosine to the first image of the row; None = not shown."""


@dataclass(frozen=True)
class Chapter:
    """Rows of images under a heading."""

    title: str
    """The heading."""
    text: str
    """Paragraph below the heading."""
    rows: Sequence[tuple[Shown, Sequence[Shown]]]
    """An image and the images beside it, for each row."""


def gallery(path: Path, title: str, text: str, chapters: Sequence[Chapter]) -> None:
    """Writes the page to `path`, atomically.

    Names and texts are escaped, so that nothing in them becomes markup.

    Raises:
        ValueError: an image cannot be read.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", _text(title)),
        tag("style", Html(_STYLE)),
    )
    with atomic_write(path) as file:  # row by row: a page can be larger than memory
        file.write(f'<!doctype html>\n<html lang="en">{head}\n'.encode())
        file.write(f"<body>{tag('h1', _text(title))}{tag('p', _text(text))}\n".encode())
        for chapter in chapters:
            file.write(
                f"{tag('h2', _text(chapter.title))}{tag('p', _text(chapter.text))}\n".encode()
            )
            for first, others in chapter.rows:
                more = (
                    tag("p", f"and {len(others) - _MAX_SHOWN} more")
                    if len(others) > _MAX_SHOWN
                    else Html()
                )
                beside = tag("div", *(_figure(other) for other in others[:_MAX_SHOWN]), more)
                file.write(f"{tag('section', _figure(first, class_='query'), beside)}\n".encode())
        file.write(b"</body></html>\n")


def _figure(shown: Shown, class_: str | None = None) -> Html:
    name, (address, width, height) = _text(shown.name), _thumbnail(shown.image())
    similarity = (
        Html() if shown.similarity is None else join(tag("b", f"{shown.similarity:.3f}"), " ")
    )
    label = "" if shown.label < 0 else f"class {shown.label}"
    image = tag(
        "img", src=address, width=width, height=height, alt=name, loading="lazy", decoding="async"
    )
    return tag(
        "figure",
        image,
        tag("figcaption", similarity, label, tag("span", name, title=name)),
        class_=class_,
    )


def _thumbnail(pixels: Tensor) -> tuple[str, int, int]:
    """Returns a JPEG as a data URL, and its width and height in pixels."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail(_THUMBNAIL)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return (
        f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        picture.width,
        picture.height,
    )


def _text(text: str) -> str:
    # A name in a file system need not be valid text.
    return redact(text).encode(errors="replace").decode()
