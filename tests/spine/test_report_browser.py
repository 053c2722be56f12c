"""The report in a real, headless Chromium with no network: it draws, asks for nothing, and anyone can read it."""

import os
import shutil
from pathlib import Path

import pytest

from batchlab.core.run import summarize
from batchlab.spine.report import STUDY_FOLDER, report

from . import run_folders as made
from .test_report import hostile_run, hostile_study

pytestmark = pytest.mark.browser

SIZES = {"desktop": (1280, 900), "phone": (360, 740)}


@pytest.fixture(scope="module")
def browser():
    if os.environ.get("BATCHLAB_NO_BROWSER") == "1":
        pytest.skip("BATCHLAB_NO_BROWSER=1")
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("chromium is not installed: `apt-get install chromium`, or set BATCHLAB_NO_BROWSER=1 to go without")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


def verified(folder):
    run = made.reached_run(folder)
    made.write_study(run.path / STUDY_FOLDER, made_from=made.facts())
    return run


def study(folder):
    return made.write_study(folder, made_from=made.facts(), notes=("a note",))


def partial(folder):
    """A running run with skipped steps and without facts."""
    return made.write_run(folder, made.step_lines(25, skipped=(4, 5)), plan=made.plan(frontier=(), reasons={}))


def empty(folder):
    return made.write_run(folder, [], plan=made.plan())


def one_step(folder):
    lines = made.step_lines(1)
    plan = made.plan()
    return made.write_run(folder, lines, plan=plan, summary=summarize(iter(lines), plan, "interrupted"))


PAGES = {f.__name__: f for f in (verified, study, partial, empty, one_step, hostile_run, hostile_study)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {name: report(make(folder / name), folder / f"{name}.html") for name, make in PAGES.items()}


class Visit:
    """An opened page, with everything that it said or asked for."""

    def __init__(self, browser, path: Path, size="desktop", scheme="light"):
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        self.page = self.context.new_page()
        self.said, self.requests, self.dialogs = [], [], []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.url = path.as_uri()
        self.page.goto(self.url)
        self.page.wait_for_selector("html[data-ready=true]", state="attached")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def quiet(self):
        return (self.said, self.dialogs, [url for url in self.requests if url != self.url])

    def marks(self):
        """Marks drawn in each visible plot: points, and lines with some length."""
        return self.page.evaluate(
            """() => {
              const shown = [...document.querySelectorAll('.plot')].filter((plot) => !plot.closest('[hidden]'));
              const lines = (plot) => [...plot.querySelectorAll('path.js-line')].filter((e) => e.getTotalLength() > 0);
              const marks = (plot) => plot.querySelectorAll('.trace .point').length + lines(plot).length;
              return Object.fromEntries(shown.map((plot) => [plot.id, marks(plot)]));
            }"""
        )

    def open_all(self):
        """Opens every table behind a plot."""
        self.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")

    def choose_each(self):
        """Presses every button of every choice, yielding after each."""
        for button in self.page.query_selector_all(".choice button[data-panel]"):
            button.click()
            yield button.inner_text()


ONE_EACH = [("study", "phone", "dark"), ("partial", "desktop", "light"), ("hostile_run", "phone", "light")]
CROSSED = [("verified", size, scheme) for size, scheme in (("desktop", "dark"), ("phone", "light"))]
VIEWS = [("verified", "desktop", "light"), ("verified", "phone", "dark"), *ONE_EACH]
VIEWS += [pytest.param(*view, marks=pytest.mark.slow) for view in CROSSED]
REST = [("empty", "phone", "light"), ("one_step", "phone", "dark"), ("hostile_study", "desktop", "dark")]


@pytest.mark.parametrize("name, size, scheme", VIEWS + REST)
def test_every_plot_has_marks_and_the_page_is_quiet_and_accessible(browser, pages, name, size, scheme):
    from axe_playwright_python.sync_playwright import Axe

    with Visit(browser, pages[name], size, scheme) as visit:
        seen = visit.marks()
        for _ in visit.choose_each():
            seen |= visit.marks()
        assert set(seen) == set(visit.page.evaluate("[...document.querySelectorAll('.plot')].map((plot) => plot.id)"))
        assert all(count > 0 for count in seen.values()), seen
        visit.open_all()
        assert visit.page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
        assert visit.quiet() == ([], [], [])
        results = Axe().run(visit.page).response
        found = [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in results["violations"]]
        assert found == [] and "color-contrast" in {passed["id"] for passed in results["passes"]}


def test_the_theme_button_recolours_page_and_plots(browser, pages):
    ask = """() => [getComputedStyle(document.body).backgroundColor,
        document.querySelector('#loss-step .scatterlayer path.js-line').style.stroke]"""
    with Visit(browser, pages["verified"]) as visit:
        light = visit.page.evaluate(ask)
        assert visit.page.inner_text("#theme") == "Dark mode"
        visit.page.click("#theme")
        dark = visit.page.evaluate(ask)
        assert visit.page.inner_text("#theme") == "Light mode"
        assert light[0] != dark[0] and light[1] != dark[1]
        visit.page.click("#theme")
        assert visit.page.evaluate(ask) == light
    with Visit(browser, pages["verified"], scheme="dark") as visit:
        assert visit.page.evaluate(ask) == dark


def test_the_keyboard_reaches_every_control_and_focus_shows(browser, pages):
    with Visit(browser, pages["verified"]) as visit:
        wanted = visit.page.evaluate(
            "[...document.querySelectorAll('button, a, summary')].filter((e) => e.checkVisibility()).length"
        )
        reached = []
        for _ in range(4 * wanted):
            visit.page.keyboard.press("Tab")
            here = visit.page.evaluate(
                "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
                "return [e.tagName, e.textContent, s.outlineStyle, parseFloat(s.outlineWidth)]; })()"
            )
            if here[0] == "BODY":
                break
            reached.append(here)
        controls = [each for each in reached if each[0] in ("BUTTON", "A", "SUMMARY")]
        assert len(controls) == wanted and controls[0][1] == "Skip to the report"
        assert all(style != "none" and width >= 2 for _, _, style, width in reached)
        visit.page.focus(".choice button:nth-of-type(3)")
        visit.page.keyboard.press("Enter")
        assert visit.page.is_visible("#loss-seconds") and not visit.page.is_visible("#loss-step")


def test_resetting_brings_a_zoomed_plot_back(browser, pages):
    ask = "document.getElementById('loss-step').layout.xaxis.range"
    with Visit(browser, pages["verified"]) as visit:
        before = visit.page.evaluate(ask)
        visit.page.evaluate("Plotly.relayout('loss-step', {'xaxis.range': [10, 20]})")
        assert visit.page.evaluate(ask) == [10, 20]
        visit.page.click("[data-plot=loss-step]")
        assert visit.page.evaluate(ask) == before


def test_the_policy_stops_what_is_not_the_page_s_own(browser, pages):
    with Visit(browser, pages["verified"]) as visit:
        visit.page.evaluate(
            """() => {
              const script = document.createElement('script'); script.textContent = 'window.ran = 1';
              document.body.append(script);
              document.body.insertAdjacentHTML('beforeend', '<img src=x onerror="window.ran = 2">');
              return fetch('http://127.0.0.1:9/').catch(() => 0);
            }"""
        )
        visit.page.wait_for_timeout(200)
        assert visit.page.evaluate("window.ran") is None
        assert len([said for said in visit.said if "Content Security Policy" in said]) >= 3


def test_without_scripts_every_number_is_still_there(browser, pages):
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(pages["verified"].as_uri())
    assert page.is_visible("noscript") or "all numbers are in the tables" in page.content()
    assert page.locator("#loss table").count() == 4
    context.close()
