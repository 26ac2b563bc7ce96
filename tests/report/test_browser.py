"""The page in a real browser, on a phone and on a wide screen, light and dark."""

import pytest

from klquant.report.comparison import Comparison
from klquant.report.page import html
from tests.report.browser import Browser, find_browser
from tests.report.build import baseline, result, sensitivity, tasks

WIDTHS = (390, 1440)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if (executable := find_browser()) is None:
        pytest.skip("no Chromium on this machine")
    with Browser(executable, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    results = [
        result("int8", 0.002, 50, tasks=tasks(0)),
        result("int4-g32-" + "long-name-" * 8, 0.0125, 27, tasks=tasks(3)),
        result("int3", 0.06, 21, tasks=tasks(9)),
        baseline(),
    ]
    parts = [("s.json", sensitivity(0.01, 0.02, 0.0001, by=by)) for by in ("class", "layer")]
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(html(Comparison.of([(f"{i}.json", r) for i, r in enumerate(results)], parts)), encoding="utf-8")
    return file


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_complains_or_is_fetched(browser, page, width, dark, tmp_path):
    browser.open(page, width, dark)
    browser.eval("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.eval("innerWidth") == width
    assert browser.eval("document.documentElement.scrollWidth") <= width
    # Nothing but what lies in a box of its own that scrolls reaches beyond the screen.
    beyond = browser.eval(
        "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .keys')"
        f" && e.getBoundingClientRect().right > {width} + 1).map(e => e.outerHTML.slice(0, 90))"
    )
    assert beyond == []
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_background(browser, page, dark):
    """WCAG: 4.5 to 1 for text; the variants' colours, 3 to 1."""
    browser.open(page, 1440, dark)
    style = "getComputedStyle(document.documentElement).getPropertyValue"
    paper = browser.eval(f"{style}('--paper')")
    assert browser.eval("getComputedStyle(document.body).backgroundColor") == _rgb(paper)
    for name in ("--ink", "--muted"):
        assert _contrast(browser.eval(f"{style}('{name}')"), paper) >= 4.5
    for i in range(7):
        assert _contrast(browser.eval(f"{style}('--s{i}')"), paper) >= 3


def test_a_phone_can_read_the_plots(browser, page):
    browser.open(page, 390)
    sizes = browser.eval(
        "[...document.querySelectorAll('figure svg')].filter(s => s.clientWidth).flatMap(s => [...s.querySelectorAll"
        "('text')].map(t => parseFloat(getComputedStyle(t).fontSize) * s.clientWidth / s.viewBox.baseVal.width))"
    )
    assert len(sizes) > 50 and min(sizes) >= 9


def _channels(colour: str) -> list[int]:
    return [int(colour.strip()[i : i + 2], 16) for i in (1, 3, 5)]


def _rgb(colour: str) -> str:
    return f"rgb({', '.join(map(str, _channels(colour)))})"


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in _channels(colour))]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(a: str, b: str) -> float:
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
