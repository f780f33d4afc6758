"""The page in a real browser: nothing is wider than the screen, and the console stays empty."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
wait = pytest.importorskip("selenium.webdriver.support.wait")

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="apt-get install chromium chromium-driver"
)
FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}


@pytest.fixture(scope="module")
def url(committed_page) -> str:
    return committed_page.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def _open(browser: Any, url: str, width: int, scheme: str = "light", media: str = "screen") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features, "media": media})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(url)
    # A busy machine is seen to return from there with half of the page.
    state = "return document.readyState"
    wait.WebDriverWait(browser, 60).until(lambda now: now.execute_script(state) == "complete")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_follows_the_scheme(browser, url, documents, width, scheme):
    _open(browser, url, width, scheme)
    facts = browser.execute_script("""
      document.querySelectorAll("details").forEach(one => { one.open = true; });
      const box = one => one.getBoundingClientRect();
      const page = document.documentElement;
      return {
        overflow: page.scrollWidth - page.clientWidth,
        wide: [...document.querySelectorAll("main *")].filter(one => !one.closest(".scroll")
          && box(one).right > innerWidth).map(one => one.outerHTML.slice(0, 80)),
        plots: [...document.querySelectorAll("svg.plot")].map(box).map(b => [b.width, b.height]),
        paper: getComputedStyle(document.body).backgroundColor,
        ink: [...new Set([...document.querySelectorAll("svg.plot text")].map(
          one => getComputedStyle(one).fill))],
        sections: document.querySelectorAll("section").length,
        loaded: performance.getEntriesByType("resource").map(one => one.name),
      };
    """)
    assert browser.get_log("browser") == []
    assert facts["overflow"] <= 0
    assert facts["wide"] == []
    assert len(facts["plots"]) > 20
    assert all(w >= 250 and h >= 100 for w, h in facts["plots"]), facts["plots"]
    assert facts["paper"] == PAPER[scheme]
    assert all(_contrast(ink, facts["paper"]) >= 4.5 for ink in facts["ink"])
    assert facts["sections"] == len(documents) + 1  # what is left out has one of its own
    assert facts["loaded"] == []


def test_on_paper_it_is_light_whole_and_without_contents(browser, url):
    _open(browser, url, 794, "dark", "print")
    facts = browser.execute_script("""
      return {
        paper: getComputedStyle(document.body).backgroundColor,
        contents: document.querySelector("nav").getBoundingClientRect().height,
        folded: [...document.querySelectorAll("details table")].map(
          one => one.getBoundingClientRect().height),
        overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      };
    """)
    assert facts["paper"] == PAPER["light"]
    assert facts["contents"] == 0
    assert min(facts["folded"]) > 0
    assert facts["overflow"] <= 0


def _contrast(one: str, other: str) -> float:
    """Of two colours ``rgb(r, g, b)``, as WCAG 2 defines it."""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in color[4:-1].split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
