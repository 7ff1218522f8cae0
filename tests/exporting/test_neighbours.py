"""Neighbours and near-duplicates against all cosines at once; the page against evil names."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from seed_exp.data.digits import DigitsSource
from seed_exp.exporting.neighbours import (
    SearchedImages,
    duplicates,
    near_duplicates,
    neighbours_of_files,
    neighbours_of_images,
    other_neighbours,
    write_duplicates,
)
from seed_exp.exporting.neighbours_page import Chapter, Shown, gallery


def cosines(features: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(features, dim=1)
    return unit @ unit.T


def test_an_image_is_not_its_own_neighbour() -> None:
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    features[7] = features[21]
    rows = torch.tensor([0, 7, 29])
    similarities, found = other_neighbours(features, rows, 4)
    expected = cosines(features).fill_diagonal_(-2)[rows].topk(4)
    torch.testing.assert_close(similarities, expected.values)
    assert torch.equal(found, expected.indices)
    assert found[1, 0] == 21
    assert other_neighbours(features, rows, 1000)[1].shape == (3, 29)


def test_of_many_copies_none_is_its_own_neighbour() -> None:
    _, found = other_neighbours(torch.ones(50, 3), torch.arange(50), 4)
    assert found.shape == (50, 4)
    assert not (found == torch.arange(50)[:, None]).any()


def test_near_duplicates_are_those_of_the_first_of_their_group() -> None:
    angles = torch.tensor(
        [0.0, 3.0, 90.0, 5.0, 91.0, 180.0, 8.0]
    ).deg2rad()  # 8 degrees are near 5 and 3, and not near 0
    features = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, 8)[:, None]
    assert near_duplicates(features, float(torch.tensor(6.0).deg2rad().cos())) == [
        [0, 1, 3],
        [2, 4],
    ]
    assert near_duplicates(features, 1.0) == []


def test_exact_copies_are_one_group_however_many() -> None:
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    features[50:150] = features[50]
    assert near_duplicates(features, 1.0) == [list(range(50, 150))]


@pytest.fixture
def images() -> SearchedImages:
    source = DigitsSource("val")
    return SearchedImages(
        source, np.arange(0, 40, 2), torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    )


def test_rows_name_the_images_of_the_source_not_the_rows_of_the_features(
    images: SearchedImages, tmp_path: Path
) -> None:
    chapter = neighbours_of_images(images, torch.tensor([3]), 2)
    ((first, beside),) = chapter.rows
    assert first.name == images.source.key(6)
    assert torch.equal(first.image(), images.source.image(6))
    assert first.label == int(images.source.labels[6])  # type: ignore[index]
    nearest = int(cosines(images.features).fill_diagonal_(-2)[3].argmax())
    assert beside[0].name == images.source.key(2 * nearest)
    write_duplicates(tmp_path / "d.jsonl", images, [[0, 5]])
    assert json.loads((tmp_path / "d.jsonl").read_text()) == [
        images.source.key(0),
        images.source.key(10),
    ]


def test_files_find_the_nearest_of_all(images: SearchedImages) -> None:
    files = DigitsSource("train")
    chapter = neighbours_of_files(images, _First(files), images.features[[4]] * 2, 3)
    ((first, beside),) = chapter.rows
    assert beside[0].name == images.source.key(8)
    assert beside[0].similarity == pytest.approx(1)
    assert first.similarity is None


class _First:
    """The first image of a source."""

    def __init__(self, source: DigitsSource) -> None:
        self.image, self.key, self.labels = source.image, source.key, None

    def __len__(self) -> int:
        return 1


def test_the_page_needs_no_other_file_and_names_cannot_become_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "0123456789abcdef")
    name = '"><script>alert(1)</script>&amp; \udcff 0123456789abcdef'
    shown = Shown(lambda: torch.zeros(3, 300, 900, dtype=torch.uint8), name, 3, 0.5)
    gallery(tmp_path / "page.html", name, name, [Chapter(name, name, [(shown, [shown] * 30)])])
    page = (tmp_path / "page.html").read_text()

    class Tags(HTMLParser):
        seen: set[str] = set()  # noqa: RUF012
        sources: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.add(tag)
            self.sources += [value or "" for key, value in attrs if key in ("src", "href")]
            if tag == "img":
                assert {
                    key: value for key, value in attrs if key in ("width", "height", "loading")
                } == {
                    "width": "240",
                    "height": "80",
                    "loading": "lazy",
                }

    parser = Tags()
    parser.feed(page)
    assert parser.seen == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "section", "div"),
        *("figure", "img", "figcaption", "b", "span"),
    }
    assert all(source.startswith("data:image/jpeg;base64,") for source in parser.sources)
    assert len(parser.sources) == 1 + 24
    assert "and 6 more" in page
    assert "0123456789abcdef" not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert not re.search(r"https?://", page)


def test_groups_of_duplicates_stand_with_their_cosines_largest_first(
    images: SearchedImages,
) -> None:
    chapter = duplicates(images, [[0, 3, 4], [1, 2]], 0.9)
    (first, beside), _ = chapter.rows
    expected = cosines(images.features)[0, [3, 4]].sort(descending=True)
    assert first.name == images.source.key(0)
    assert [shown.similarity for shown in beside] == pytest.approx(expected.values.tolist())
    assert "2 groups of 5 images;" in chapter.text
