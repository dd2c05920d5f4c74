"""A report in a real browser: no error, every picture there, tables sort, nothing runs off.

`pip install -e '.[browser]'` and a Chromium: CSC_CHROMIUM names it, else /usr/bin/chromium, else
the one that `playwright install chromium` brings.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from report_cases import made_up_run

from csc_jax.reporting import report

try:
    from playwright.sync_api import Error, sync_playwright
except ImportError:
    sync_playwright = None

CHROMIUM = Path(os.environ.get("CSC_CHROMIUM", "/usr/bin/chromium"))
NAMES = ("road", "side\u202ewalk", "<img src=x onerror=alert(1)>", "a class with a long name " * 3)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        sync_playwright is None, reason="no Playwright: pip install -e '.[browser]'"
    ),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    run = made_up_run(folder / "csc", NAMES)
    others = [
        made_up_run(folder / f"{method}_{seed}", NAMES, seed, method__name=method)
        for method in ("csc", "supervised")
        for seed in (1, 2)
    ]
    path = run / "report.html"
    path.write_text(report.page(run, others), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    installed = str(CHROMIUM) if CHROMIUM.is_file() else None
    with sync_playwright() as playwright:
        try:
            # Root, as in a container, has no sandbox; the page is ours.
            found = playwright.chromium.launch(
                executable_path=installed, args=["--no-sandbox"] if os.getuid() == 0 else []
            )
        except Error as error:
            pytest.skip(f"no Chromium at {CHROMIUM}, nor Playwright's own ({str(error)[:80]})")
        yield found
        found.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request):
    return request.param


@pytest.fixture(params=[1280, 390])
def page(browser, file, scheme, request):
    """The report, opened; fails in the end for anything that the browser complained about."""
    complaints = []
    page = browser.new_page(viewport={"width": request.param, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or complaints.append(r.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert complaints == []


def test_it_opens_at_any_width_and_in_either_scheme(page, scheme, tmp_path):
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 9
    assert min(widths) > 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for chart in page.query_selector_all("svg"):
        box = chart.bounding_box()
        assert box["width"] > 150
        assert box["height"] > 100
    picture = tmp_path / "page.png"
    page.screenshot(path=picture, full_page=True)
    import cv2

    pixels = cv2.imread(str(picture))
    assert pixels.shape[0] > 3000
    assert (np.median(pixels) > 128) == (scheme == "light")


def test_a_click_sorts_a_table_and_a_second_one_turns_it_round(page):
    column = "#scores tbody tr td:nth-child(3)"

    def ious():
        return [float(text) for text in page.locator(column).all_inner_texts()]

    before = ious()
    assert len(before) == len(NAMES)
    head = page.locator("#scores th", has_text="IoU %").first
    head.get_by_role("button").click()
    assert ious() == sorted(before)
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").press("Enter")
    assert ious() == sorted(before, reverse=True)
    names = page.locator("#scores tbody tr td:nth-child(2)")
    page.locator("#scores th", has_text="class").get_by_role("button").click()
    shown = names.all_inner_texts()
    assert shown == sorted(shown, key=str.casefold)
    assert r"side\u202ewalk" in shown
