"""The report in headless Chromium: no complaint, every figure drawn, filters that filter, any width, dark and light."""

import json
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from report_sample import demo_folder, training_folder
from study_sample import study_folder

from bcr.report import write_report

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser():
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail("no Chromium or Chrome is installed; these tests never skip: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return write_report(demo_folder(tmp_path_factory.mktemp("demo")))


def opened(browser: Browser, file: Path, viewport=DESKTOP, **options) -> tuple[Page, list[str]]:
    """The page offline, and everything it complains about or asks the network for."""
    page = browser.new_context(viewport=viewport, offline=True, **options).new_page()
    page.set_default_timeout(120_000)  # milliseconds; a loaded machine takes its time
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page.goto(file.as_uri())
    return page, complaints


def test_every_figure_is_drawn_and_nothing_complains(browser, demo, tmp_path):
    training_folder(tmp_path / "run", steps=3)
    for file in (demo, write_report(tmp_path / "run"), write_report(study_folder(tmp_path / "study"))):
        page, complaints = opened(browser, file)
        sizes = page.evaluate("[...document.querySelectorAll('svg')].map(s => [s.getBBox().width, s.getBBox().height, s.clientWidth])")
        assert len(sizes) == page.locator("figure").count() >= 3
        for width, height, shown in sizes:
            assert width > 250
            assert height > 90
            assert shown > 250
        assert complaints == []


@pytest.mark.parametrize("kind", ["demo", "study"])
def test_marks_lie_inside_their_figure(browser, demo, kind, tmp_path):
    """Nothing that is drawn sticks out of its picture, labels included; names at the ends of curves do not lie on each other."""
    page, _ = opened(browser, demo if kind == "demo" else write_report(study_folder(tmp_path)))
    outside = page.evaluate("""[...document.querySelectorAll('svg')].flatMap(svg => {
        const frame = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text, circle, line, polyline, rect')].filter(mark => {
            const box = mark.getBoundingClientRect();
            return box.left < frame.left - 6 || box.right > frame.right + 6 || box.top < frame.top - 6 || box.bottom > frame.bottom + 6;
        }).map(mark => mark.outerHTML);
    })""")
    assert outside == []
    overlaps = page.evaluate("""[...document.querySelectorAll('svg')].flatMap(svg => {
        const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
        return boxes.flatMap(([a, one], i) => boxes.slice(i + 1).filter(([b, two]) =>
            one.left < two.right - 1 && two.left < one.right - 1 && one.top < two.bottom - 5 && two.top < one.bottom - 5
        ).map(([b]) => [a, b]));
    })""")
    assert overlaps == []


def visible(page: Page, section: str) -> list[dict]:
    return page.evaluate(
        f"[...document.querySelectorAll('#{section} .item')].filter(item => item.offsetParent !== null).map(item => ({{...item.dataset}}))"
    )


def every(page: Page, section: str) -> list[dict]:
    return page.evaluate(f"[...document.querySelectorAll('#{section} .item')].map(item => ({{...item.dataset}}))")


def show_all(page: Page, section: str) -> None:
    while page.locator(f"#{section} .more").is_visible():
        page.locator(f"#{section} .more").click()


@pytest.mark.parametrize("section", ["pairs", "rollouts"])
def test_filters_leave_exactly_what_they_name(browser, demo, section):
    page, complaints = opened(browser, demo)
    form = page.locator(f"#{section} form")
    assert len(visible(page, section)) == 6
    form.locator("[name=run]").select_option("penalty")
    form.locator("[name=tag]").select_option("unanswered")
    form.locator("[name=most]").fill("12")
    form.locator("[name=place]").select_option(index=1)
    show_all(page, section)
    place = form.locator("[name=place]").input_value()
    expected = [
        item
        for item in every(page, section)
        if item["run"] == "penalty" and "unanswered" in item["tags"].split() and float(item["length"]) <= 12 and item["place"] == place
    ]
    assert visible(page, section) == expected
    said = form.locator("output").inner_text()
    assert said == (f"{len(expected)} of {len(expected)} shown" if expected else "none fit")
    form.locator("[name=least]").fill("100000")
    assert visible(page, section) == []
    assert form.locator("output").inner_text() == "none fit"
    form.get_by_role("button", name="Clear").click()
    page.wait_for_function(f"document.querySelectorAll('#{section} .item:not([hidden])').length === 6")
    assert complaints == []


def test_gained_and_lost_are_found(browser, demo):
    page, _ = opened(browser, demo)
    for tag in ("gained", "lost"):
        page.locator("#pairs [name=tag]").select_option(tag)
        assert visible(page, "pairs")
        assert all(tag in item["tags"].split() for item in visible(page, "pairs"))


def test_it_can_be_used_by_keyboard_alone(browser, demo):
    page, _ = opened(browser, demo)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.locator("#pairs [name=tag]").focus()
    page.keyboard.type("some w")
    assert {"wrong"} <= set.intersection(*(set(item["tags"].split()) for item in visible(page, "pairs")))
    page.keyboard.press("Home")
    page.locator("#pairs .more").focus()
    page.keyboard.press("Enter")
    assert len(visible(page, "pairs")) > 6
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("table").first.is_visible()


def test_controls_and_figures_have_names(browser, demo):
    page, _ = opened(browser, demo)
    unnamed = page.evaluate("""[...document.querySelectorAll('select, input, button, svg, nav, form')].filter(element =>
        !(element.labels && element.labels.length) && !element.getAttribute('aria-label') && !element.textContent.trim()).length""")
    assert unnamed == 0
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(heading => Number(heading.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1


@pytest.mark.parametrize("width", [320, 360, 768, 1280, 1920])
def test_no_width_scrolls_sideways(browser, demo, width):
    page, _ = opened(browser, demo, {"width": width, "height": 800})
    for details in page.locator("summary").all():
        details.click()
    for section in ("pairs", "rollouts"):
        show_all(page, section)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_hostile_strings_neither_run_nor_break_the_layout(browser, tmp_path):
    folder = demo_folder(tmp_path, ("base", "bcr"))
    hostile = json.dumps("</script><script>window.owned = 1</script><img src=x onerror='window.owned = 1'>" + "x" * 3000)[1:-1]
    for file in (folder / "evaluations.jsonl", folder / "runs" / "bcr" / "rollouts.jsonl", folder / "summary.json"):
        file.write_text(
            file.read_text().replace("wait check ", hostile).replace("BCR, N = 3", hostile).replace("Not shown: a law.", hostile)
        )
    page, complaints = opened(browser, write_report(folder), PHONE)
    assert page.evaluate("window.owned") is None
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_dark_and_light_follow_the_system(browser, demo):
    grounds = {}
    for scheme in ("light", "dark"):
        page, complaints = opened(browser, demo, color_scheme=scheme)
        assert complaints == []
        grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert min(grounds["light"]) > 230
    assert max(grounds["dark"]) < 50


def test_without_a_script_everything_is_there(browser, demo):
    page, _ = opened(browser, demo, java_script_enabled=False)
    items = page.locator(".item")
    assert items.count() > 100
    assert items.last.is_visible()
    assert not page.locator("form").first.is_visible()
