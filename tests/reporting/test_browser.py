"""The page in a real browser: what people see and touch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, require_chromium
from made_runs import DIGITS, STUDENTS, add_results, make_run
from PIL import Image

from seed_exp.config.schema import ReportConfig
from seed_exp.tools.report import report

pytestmark = pytest.mark.slow
NO_SCROLL = "return [innerWidth, document.documentElement.scrollWidth]"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of four columns and two seeds.

    Beside a half-finished run stands a number published for other images.
    """
    home = tmp_path_factory.mktemp("report")
    for size in (128, 512, 1024):
        for seed in (0, 1):
            options = [
                *DIGITS,
                STUDENTS,
                "teacher=moco_v2_r50",
                f"objective.queue_size={size}",
                f"seed={seed}",
            ]
            run = make_run(home / "runs" / f"{size}-{seed}", "distill", options)
            add_results(
                run, {"convnet_w2": (50 + seed, 60 + seed, 90), "convnet_w32": (70 + seed, 80, 95)}
            )
    make_run(
        home / "runs" / "half", "pretrain", [*DIGITS, "student=resnet18"], step=30, finished=False
    )
    return report(ReportConfig(runs=[str(home / "runs")], output=str(home / "out")))


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    require_chromium()
    browser = Browser(tmp_path_factory.mktemp("profile"), 1280, 900)
    yield browser
    browser.close()


@pytest.fixture
def browser(window: Browser, page: Path) -> Browser:
    """The page on a desktop, fresh."""
    window.resize(1280, 900)
    window.media()
    window.open(page)
    return window


def test_it_loads_without_a_complaint_or_a_request(browser: Browser) -> None:
    assert browser.messages() == []
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.run("return document.querySelectorAll('svg[data-chart]').length") > 5


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_only_tables_scroll_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.resize(width, 844)
    browser.open(page)
    browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
    assert browser.run(NO_SCROLL) == [width, width]
    boxes = browser.run(
        "return [...document.querySelectorAll('.box')]"
        ".map(b => [b.clientWidth, getComputedStyle(b).overflowX])"
    )
    assert all(inner <= width and overflow == "auto" for inner, overflow in boxes)
    if width == 390:
        assert browser.run(
            "const b = document.querySelector('.box'); return b.scrollWidth > b.clientWidth"
        )


def test_a_number_shows_where_it_comes_from(browser: Browser) -> None:
    browser.run("document.querySelector('td a').click()")
    shown = browser.run("const d = document.querySelector('dialog'); return [d.open, d.innerText]")
    assert shown[0]
    assert all(
        part in shown[1] for part in ("sha256", "knn-00000000.json", "digits:train:1437", "seed")
    )
    browser.run("document.querySelector('dialog button').click()")
    assert not browser.run("return document.querySelector('dialog').open")


def test_curves_are_switched_off_and_on(browser: Browser) -> None:
    visible = """return [...document.querySelectorAll('figure .curve.g0')]
        .filter(curve => getComputedStyle(curve).display != 'none').length"""
    before = browser.run(visible)
    assert before > 3
    browser.run("document.getElementById('g0').click()")
    assert browser.run(visible) == 0
    browser.run("document.getElementById('g0').click()")
    assert browser.run(visible) == before


def test_pointing_at_a_diagram_tells_its_values(browser: Browser) -> None:
    browser.run("document.querySelector('svg[data-chart]').scrollIntoView({block: 'center'})")
    box = browser.run(
        "const b = document.querySelector('svg[data-chart]').getBoundingClientRect(); "
        "return [b.x, b.y, b.width, b.height]"
    )
    browser.cdp(
        "Input.dispatchMouseEvent",
        type="mouseMoved",
        x=box[0] + box[2] * 0.6,
        y=box[1] + box[3] / 2,
    )
    tip = browser.run(
        "const t = document.querySelector('.tip'); "
        "return [t.hidden, t.innerText, t.getBoundingClientRect().right]"
    )
    assert tip[0] is False
    assert tip[1].startswith("step ")
    assert tip[2] <= 1280
    browser.cdp("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.run("return document.querySelector('.tip').hidden")


def test_the_table_of_costs_is_sorted_by_a_click(browser: Browser) -> None:
    column = (
        "return [...document.querySelectorAll('#cost tbody tr')]"
        ".map(row => Number(row.cells[7].dataset.value))"
    )
    head = "document.querySelectorAll('#cost thead button')[7].click()"
    browser.run(head)
    up = browser.run(column)
    browser.run(head)
    assert up == sorted(up)
    assert browser.run(column) == up[::-1]


def test_without_scripts_everything_is_there_and_curves_can_still_be_switched(
    browser: Browser, page: Path
) -> None:
    browser.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert browser.run("return document.querySelectorAll('dialog, th button').length") == 0
        browser.run("document.getElementById('g0').checked = false")
        assert (
            browser.run("return getComputedStyle(document.querySelector('figure .g0')).display")
            == "none"
        )
        browser.run("location.hash = document.querySelector('td a').getAttribute('href')")
        assert (
            browser.run(
                "return document.querySelector('article:target').getBoundingClientRect().top"
            )
            < 900
        )
    finally:
        browser.cdp("Emulation.setScriptExecutionDisabled", value=False)


CONTRAST = """
const linear = (value) =>
  value <= 10 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
const light = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = light(getComputedStyle(document.body).backgroundColor);
const ratio = (c) => {
  const l = light(c);
  return (Math.max(l, paper) + 0.05) / (Math.min(l, paper) + 0.05);
};
const texts = document.querySelectorAll(
  'body, p, li, a, th, td, small, .state, .reference, .spread');
const text = [...texts].map(e => ratio(getComputedStyle(e).color));
const curves = document.querySelectorAll('figure .curve');
const lines = [...curves].map(e => ratio(getComputedStyle(e).stroke));
return [Math.min(...text), Math.min(...lines), paper];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_from_the_page_by_day_and_by_night(
    browser: Browser, page: Path, scheme: str
) -> None:
    browser.media(prefers_color_scheme=scheme)
    browser.open(page)
    assert browser.run("return document.querySelectorAll('.reference').length") > 0
    text, lines, paper = browser.run(CONTRAST)
    assert (paper > 0.5) is (scheme == "light")
    assert text >= 4.5  # WCAG 2.2, AA: text
    assert lines >= 3  # graphical objects


def test_on_paper_it_is_dark_on_white_and_nothing_is_cut(
    browser: Browser, page: Path, tmp_path: Path
) -> None:
    browser.media(media="print", prefers_color_scheme="dark")
    browser.open(page)
    assert (
        browser.run("return getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    assert len(browser.cdp("Page.printToPDF", preferCSSPageSize=True)["data"]) > 10_000


def test_it_paints_something(browser: Browser, tmp_path: Path) -> None:
    browser.screenshot(tmp_path / "page.png")
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    assert picture.size == (1280, 900)
    assert len(picture.getcolors(1 << 20) or []) > 20
