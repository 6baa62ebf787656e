"""The report of a tiny run in headless Chromium: content, errors, keyboard, dark, phone, print."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_run import fit

sync_api = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True}


def program() -> str:
    """The path of a Chromium: that of LMERGE_CHROMIUM, or the first that is installed."""
    named = os.environ.get("LMERGE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if named is None:
        pytest.skip("needs Chromium (apt-get install chromium), or its path in LMERGE_CHROMIUM")
    return named


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    path = program()
    with sync_api.sync_playwright() as playwright:
        # In a container Chromium runs as root, where its sandbox cannot.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run on the tiny model, in two domains and two languages."""
    folder = tmp_path_factory.mktemp("browser") / "tiny"
    options = ("--data.domains=[medical,legal]", "--data.languages=[en,es]")
    fit(tiny_dir, folder, *options, "--artefacts.report=true")
    return folder / "report.html"


class Tab:
    """A page with what went wrong on it: console messages, errors, requests."""

    def __init__(self, browser: sync_api.Browser, path: Path, **context: object) -> None:
        self.page = browser.new_context(**context).new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url))
        self.page.goto(path.as_uri())

    def _note(self, url: str) -> None:
        if not url.startswith(("file:", "data:")):
            self.wrong.append(f"requested {url}")

    def shown(self) -> list[str]:
        """The captions of the heatmaps that can be seen."""
        captions = self.page.locator("#heatmaps figure:visible figcaption")
        return captions.all_text_contents()

    def colour(self, selector: str, name: str) -> list[int]:
        """The red, green and blue of a computed style."""
        style = f"e => getComputedStyle(e).{name}"
        text = self.page.locator(selector).first.evaluate(style)
        return [int(part) for part in text[text.index("(") + 1 : -1].split(",")[:3]]


def test_the_page_shows_every_section_without_errors_or_requests(
    browser: sync_api.Browser, path: Path
) -> None:
    tab = Tab(browser, path)
    for name in ("cost", "plan", "similarity", "alignment", "training", "subjects", "texts"):
        box = tab.page.locator(f"section#{name}").bounding_box()
        assert box is not None
        assert box["height"] > 60
    assert "2 of the 4 layers" in tab.page.inner_text("header")
    figures = tab.page.locator("figure:visible svg")
    assert figures.count() >= 6
    assert all(figure.bounding_box()["width"] > 200 for figure in figures.all())
    assert tab.wrong == []


def test_the_keyboard_reaches_the_switch_and_changes_the_heatmap(
    browser: sync_api.Browser, path: Path
) -> None:
    tab = Tab(browser, path)
    focused = "document.activeElement.name || document.activeElement.className || ''"
    reached = []
    while "language" not in reached:
        assert len(reached) < 40, reached
        tab.page.keyboard.press("Tab")
        reached.append(tab.page.evaluate(focused))
    assert reached[0] == "skip"
    assert reached[-2:] == ["domain", "language"]
    outline = tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    before = tab.shown()
    tab.page.keyboard.press("ArrowDown")
    (after,) = tab.shown()
    assert before == ["angular: medical/en"]
    assert after == "angular: medical/es"
    assert tab.wrong == []


def test_the_domain_of_all_prompts_is_shown_in_any_language(
    browser: sync_api.Browser, path: Path
) -> None:
    tab = Tab(browser, path)
    tab.page.get_by_label("Language").select_option("es")
    tab.page.get_by_label("Domain").select_option("all")
    assert tab.shown() == ["angular: all"]


def test_a_choice_that_was_not_measured_is_said(browser: sync_api.Browser, path: Path) -> None:
    tab = Tab(browser, path)
    tab.page.get_by_label("Language").select_option("es")
    tab.page.get_by_label("Domain").select_option("legal")  # the bundled bank has it in English
    assert tab.shown() == []
    assert "Not measured" in tab.page.inner_text("#similarity output")


def test_without_scripts_all_heatmaps_are_shown(browser: sync_api.Browser, path: Path) -> None:
    tab = Tab(browser, path, java_script_enabled=False)
    assert len(tab.shown()) == 4
    assert not tab.page.get_by_label("Language").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_figures_stand_out_in_light_and_dark(
    scheme: str, browser: sync_api.Browser, path: Path
) -> None:
    tab = Tab(browser, path, color_scheme=scheme)
    paper = tab.colour("body", "backgroundColor")
    assert (sum(paper) > 600) == (scheme == "light")
    for selector, name in (("body", "color"), ("#plan svg text", "fill"), (".note", "color")):
        assert contrast(tab.colour(selector, name), paper) > 4.5


def contrast(one: list[int], other: list[int]) -> float:
    """The contrast of two colours, 1 to 21 (WCAG 2.2, relative luminance)."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: list[int]) -> float:
    parts = [c / 255 for c in colour]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_phone_shows_it_without_sideways_scrolling(browser: sync_api.Browser, path: Path) -> None:
    tab = Tab(browser, path, **PHONE)
    widths = tab.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths == [390, 390]
    label = tab.page.locator("#cost td[data-label=merged]").first
    assert label.evaluate("e => getComputedStyle(e, '::before').content") == '"merged"'


def test_no_number_is_cut_off_on_a_narrow_phone(browser: sync_api.Browser, path: Path) -> None:
    tab = Tab(browser, path, viewport={"width": 320, "height": 700}, is_mobile=True)
    over = "e => [...e.querySelectorAll('td')].filter(c => c.scrollWidth > c.clientWidth).length"
    assert tab.page.locator("#cost table").first.evaluate(over) == 0


def test_print_shows_every_heatmap_and_no_switch(browser: sync_api.Browser, path: Path) -> None:
    tab = Tab(browser, path, color_scheme="dark")
    tab.page.emulate_media(media="print")
    assert len(tab.shown()) == 4
    assert not tab.page.get_by_label("Language").is_visible()
    assert not tab.page.locator("nav").is_visible()
    assert not tab.page.locator("details").first.is_visible()  # nothing unfolds on paper
    assert tab.page.pdf(format="A4").startswith(b"%PDF")
