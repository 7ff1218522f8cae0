from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import DIGITS, STUDENTS, add_results, make_run
from PIL import Image

from seed_exp.config.options import effective_options
from seed_exp.reporting.columns import TableColumn
from seed_exp.reporting.comparison import Table, compare
from seed_exp.reporting.page.build import page
from seed_exp.reporting.page.content import Model, PageContent
from seed_exp.reporting.page.html import VOID
from seed_exp.reporting.page.numbers import training_seconds
from seed_exp.reporting.published import Published
from seed_exp.reporting.runs import Result, Run, read_runs
from seed_exp.reporting.table_cells import Provenance, TableCell, Value

EVIL = "<script>alert(1)</script>\"'&"
THEIRS = [
    Published(
        "convnet_w2",
        "resnet50",
        "moco_v2",
        "seed",
        "linear_top1",
        "imagenet",
        57.6,
        f"SEED {EVIL}",
        200,
        "",
    ),
    Published("convnet_w2", "", "", "moco_v2", "linear_top1", "imagenet", 52.5, "SEED", 200, ""),
]


class Elements(HTMLParser):
    """Every element of a document; fails where they are not nested as they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def document(folder: Path) -> str:
    runs, problems = read_runs([folder], effective_options)
    table = compare("digits", runs, THEIRS, lambda run, name, like: f"{name} {run.folder}")
    return page(
        PageContent("A report", [table], runs, THEIRS, {"convnet_w2": Model(1626, 10**6)}, problems)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds with results and a half-finished run, in folders with bad names.

    There are pictures, and a picture file that holds none.
    """
    for seed in (0, 1):
        run = make_run(
            tmp_path / "runs" / f"a{seed}",
            "distill",
            [*DIGITS, STUDENTS, "teacher=moco_v2_r50", f"seed={seed}"],
        )
        add_results(run, {"convnet_w2": (50 + seed, 60 + seed, 90), "convnet_w32": (70, 80, 95)})
    make_run(
        tmp_path / "runs" / EVIL.replace("/", "|"),
        "pretrain",
        [*DIGITS, "student=convnet_w2"],
        step=30,
        finished=False,
    )
    (tmp_path / "runs" / "a0" / "media" / "convnet_w2").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(
        tmp_path / "runs" / "a0" / "media" / "convnet_w2" / "embedding_map.png"
    )
    (tmp_path / "runs" / "a0" / "media" / "bad.png").write_text(EVIL)
    return tmp_path / "runs"


def test_the_page_asks_the_network_for_nothing(folder: Path) -> None:
    text = document(folder)
    elements = Elements(text).found
    for tag, attributes in elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "srcset", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), (
                attributes
            )
    assert not re.search(
        r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(", text
    )
    (policy,) = (
        attributes["content"] for tag, attributes in elements if "http-equiv" in attributes
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert len([tag for tag, _ in elements if tag == "img"]) == 1


def test_names_with_markup_are_text(folder: Path) -> None:
    (folder / "a0" / "results" / "knn-x.json").write_text(EVIL)
    elements = Elements(document(folder))
    assert len([tag for tag, _ in elements.found if tag == "script"]) == 1
    assert "alert" not in elements.scripts[0]
    assert {
        name for _, attributes in elements.found for name in attributes if name.startswith("on")
    } == set()


def test_every_number_leads_to_the_place_that_says_where_it_comes_from(folder: Path) -> None:
    text = document(folder)
    elements = Elements(text).found
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [(attributes["href"] or "")[1:] for tag, attributes in elements if tag == "a"]
    assert set(links) <= set(ids)
    assert (
        len([link for link in links if re.fullmatch(r"t\d+r\d+c\d+", link)]) == 6
    )  # K, T-1, T-5 of two students
    (article,) = re.findall(r'<article id="t0r0c1">.*?</article>', text)
    for part in (
        "a0/results/knn-00000000.json",
        "a1/results/linear-00000001.json",
        "step 100, sha256 0000",
        "torch 2.11",
    ):
        assert part in article
    for part in (
        "digits:train:1437:9e3955ebcebe34df",
        "50.00",
        "51.00",
        "<dt>seed</dt><dd>1</dd>",
        "does not compare",
    ):
        assert part in article


def test_a_number_for_other_images_is_never_beside_ours_without_saying_so(folder: Path) -> None:
    text = document(folder)
    assert re.search(
        r'<small class="reference" title="[^"]*does not compare[^"]*">\[57\.6\]</small>', text
    )
    assert "(57.6" not in text
    assert "trained on digits:train:1437, not on imagenet" in text
    ours, theirs = re.findall(r"<figure class=\"wide\">.*?</figure>", text)
    assert "57.6" not in ours
    assert "convnet_w32" not in theirs


def test_curves_are_drawn_per_objective_and_switched_without_a_script(folder: Path) -> None:
    text = document(folder)
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles.count("Loss, seed") == titles.count("Loss, moco_v2") == 1
    assert "Effective neighbours in the teacher&#x27;s target" in titles
    groups = [attributes["id"] for tag, attributes in Elements(text).found if tag == "input"]
    assert len(groups) == 3  # two students distilled, one trained alone
    assert all(
        f"body:has(#{name}:not(:checked)) .{name}{{display:none}}" in text for name in groups
    )


def test_the_time_of_training_is_that_of_its_steps(folder: Path) -> None:
    runs, _ = read_runs([folder / "a0"], effective_options)
    assert training_seconds(runs[0]) == pytest.approx(100 * 32 / 640)


def test_nothing_at_all_is_a_page_too_and_the_same_runs_give_the_same_page(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    Elements(document(tmp_path / "empty"))
    assert document(folder) == document(folder)


def test_a_difference_of_the_best_of_several_learning_rates_is_marked() -> None:
    run = Run(Path("run"), "distill", "0.1.0", {}, {}, ["a"])
    for lrs, marks in (([30.0], 0), ([3.0, 30.0], 2)):
        source = Provenance(
            run, Result(Path("r.json"), "linear", {"options": {"lrs": lrs}}, {}, {}), {}, 57.0
        )
        cell = TableCell({"T-1": Value((source,), THEIRS[0], ())})
        table = Table("t", ["a"], {"a": 1}, [TableColumn("b", {})], {("a", 0): cell}, ["T-1"])
        text = page(PageContent("t", [table], [], [], {}, []))
        assert "−0.6" in text
        assert text.count("†") == marks
