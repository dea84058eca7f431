"""The page in a real Chromium, on a real server with the network that ships."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from service.api.page import WEB
from tests.service.browser import INTERACTIVE, Browser
from tests.service.pages import ZOO_BUNDLE, choose_sample, give, open_page, sample_names, wait_for_answer
from tests.service.process import ServerProcess, running_server

N_EXITS = 6
TOKEN = "token-of-the-test"
WIDEST = "return Math.max(...[...document.querySelectorAll('main *')].map((e) => e.getBoundingClientRect().right))"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("page") / "server.log"
    with running_server(ZOO_BUNDLE, log, "--budget-fraction", "0.4", "--lanes", "1") as server:
        yield server
        assert "Traceback" not in log.read_text()


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Iterator[Browser]:
    """The loaded page; at the end its console must be empty, without requests to other hosts."""
    open_page(browser, server)
    yield browser
    assert browser.messages() == []
    assert browser.requests() <= {f"127.0.0.1:{server.port}", ""}


def set_fraction(server: ServerProcess, fraction: float) -> None:
    httpx.put(server.url + "/budget", json={"fraction": fraction}).raise_for_status()


def test_a_sample_shows_its_answer_exit_by_exit(page: Browser) -> None:
    assert len(sample_names(page)) == 9
    choose_sample(page, "fox")
    states = [row.get_dom_attribute("data-state") for row in page.all("#exits tr")]
    taken = states.index("left") + 1
    assert states == ["passed"] * (taken - 1) + ["left"] + ["saved"] * (N_EXITS - taken)
    guesses = [cell.text for cell in page.all("#exits .guess")]
    assert all(guesses[:taken])
    assert not any(guesses[taken:])
    answer = page.text("#answer")
    assert f"Left at exit {taken} of {N_EXITS}." in answer
    assert answer.startswith(guesses[taken - 1].split()[0])
    assert ("✓ right" in answer) == answer.startswith("fox")
    assert "full network's 60.3 M" in page.text("#cost")
    scores = [cell.text for cell in page.all("#exits .against")]
    assert all(", needs " in text for text in scores[:taken])
    assert page.find("#samples button[aria-pressed=true]").text == "fox"


def test_steps_are_animated_and_another_image_replaces_them(browser: Browser, server: ServerProcess) -> None:
    open_page(browser, server, prefers_reduced_motion="no-preference")
    set_fraction(server, 1.0)
    browser.find("#samples li:last-child button").click()
    browser.until(lambda: browser.all("#exits [data-state=here]"), "the first exit speaks")
    assert "Left at exit" not in browser.text("#answer"), "all steps came at once"
    browser.find("#samples li:first-child button").click()
    wait_for_answer(browser)
    assert browser.text("#answer").startswith(sample_names(browser)[0])
    assert browser.messages() == []


@pytest.mark.parametrize("way", ["pick", "drop", "paste"])
def test_users_can_classify_their_own_image(page: Browser, tmp_path: Path, way: str) -> None:
    file = tmp_path / "own.jpg"
    with Image.open(WEB / "samples" / "orange.png") as sample:
        sample.resize((640, 480)).save(file)
    give(page, way, file)
    wait_for_answer(page)
    assert "32 \u00d7 32" in page.text("#seen-note")
    pixels = page.script(
        "return [...arguments[0].getContext('2d').getImageData(0, 0, 32, 32).data]", page.find("#seen")
    )
    assert len(set(pixels)) > 50, "the preview is empty"
    assert not page.all("#samples [aria-pressed=true]")


def test_a_bad_file_shows_the_servers_reason(browser: Browser, server: ServerProcess, tmp_path: Path) -> None:
    open_page(browser, server)
    (tmp_path / "notes.png").write_text("not a picture at all")
    browser.find("#file").send_keys(str(tmp_path / "notes.png"))
    browser.until(lambda: browser.all("#answer .problem"), "the problem is shown")
    told = httpx.post(server.url + "/classify", content=b"not a picture at all", headers={"Content-Type": "image/png"})
    assert told.json()["title"] in browser.text("#answer .problem")
    assert told.json()["detail"].split("(")[0].strip() in browser.text("#answer .problem")
    [message] = browser.messages()  # the browser always logs the failed request itself
    assert "400" in message
    choose_sample(browser, "lion")
    assert not browser.all("#answer .problem")
    assert browser.messages() == []


def test_the_budget_moves_by_keyboard_and_by_dragging_the_point(page: Browser, server: ServerProcess) -> None:
    set_fraction(server, 0.4)
    page.until(lambda: page.text("#budget-share") == "40 %", "the page follows the server")
    before = [bar.value_of_css_property("width") for bar in page.all("#shares .expected")]
    point = page.find(".point").location
    page.find("#budget").send_keys(Keys.ARROW_RIGHT * 3, Keys.PAGE_UP)
    page.until(lambda: fraction(server) == pytest.approx(0.53), "the server has the new budget")
    page.until(lambda: page.text("#budget-share") == "53 %", "the page shows it")
    assert page.find(".point").location["x"] > point["x"]
    assert [bar.value_of_css_property("width") for bar in page.all("#shares .expected")] != before
    assert "53 % of the full network" in (page.find("#budget").get_dom_attribute("aria-valuetext") or "")
    assert "53 %" in (page.find("#curve").get_dom_attribute("aria-label") or "")

    over = page.find(".u-over")
    start = -over.size["width"] // 2 + 2
    drag = ActionChains(page.driver).move_to_element_with_offset(over, start, 0).click_and_hold()
    drag.move_by_offset(20, 0).move_by_offset(-60, 0).release().perform()
    page.until(lambda: fraction(server) < 0.23, "the point can be dragged to the cheapest budget")
    page.until(lambda: page.text("#budget-share") == "22 %", "the page shows it")
    assert page.find("#budget-limit").is_displayed() is False
    set_fraction(server, 1.0)
    page.until(lambda: page.find("#budget-limit").is_displayed(), "it says where going deeper stops paying")


def test_scrolling_and_secondary_buttons_do_not_set_the_budget(page: Browser, server: ServerProcess) -> None:
    set_fraction(server, 0.4)
    page.until(lambda: page.text("#budget-share") == "40 %", "the page follows the server")
    ActionChains(page.driver).move_to_element_with_offset(page.find(".u-over"), 60, 0).context_click().perform()
    for place in (".u-over", "#budget"):
        from_px = page.touch(page.find(place), [(i // 2, -12 * i) for i in range(12)])
        page.until(lambda from_px=from_px: page.script("return scrollY") > from_px, "the page is scrolled")
    page.until(lambda: page.text("#budget-share") == "40 %", "what was begun is taken back")
    assert fraction(server) == pytest.approx(0.4)
    page.touch(page.find(".u-over"), [(8 * i, i) for i in range(12)])
    page.until(lambda: fraction(server) > 0.7, "a finger that goes along drags the point")
    page.touch(page.find(".u-over"), [(0, 0)])
    page.until(lambda: 0.55 < fraction(server) < 0.65, "and one that is lifted sets it")


def fraction(server: ServerProcess) -> float:
    return httpx.get(server.url + "/budget").json()["fraction"]


def test_a_hundred_pictures_follow_the_budget(page: Browser, server: ServerProcess) -> None:
    counts = []
    for budget, shown in ((0.25, "25 %"), (0.9, "90 %")):
        set_fraction(server, budget)
        page.until(lambda shown=shown: page.text("#budget-share") == shown, "the page follows the server")
        page.find("#hundred").click()
        page.until(lambda: "left early" in page.text("#hundred-result"), "a hundred are answered")
        counts.append([int(cell.text) for cell in page.all("#tiles .count")])
        assert sum(counts[-1]) == len(page.all("#tiles .tile")) == 100
        assert "answered right" in page.text("#hundred-result")
        assert f"({shown})" in page.text(".meter:nth-child(2)")
        page.until(lambda: "live" in page.text("#shares"), "the live shares are counted")
    assert counts[1][0] < counts[0][0], "a larger budget lets fewer leave at the first exit"
    assert counts[1][-1] > counts[0][-1]


def test_a_stream_of_pictures_runs_until_it_is_stopped(page: Browser, server: ServerProcess) -> None:
    page.find("#stream").click()
    page.until(lambda: len(page.all("#tiles .tile")) == 100, "they come")
    page.find("#hundred").click()  # waits for the stream's end: nothing happens
    assert page.text("#stream") == "Stop"
    page.script(
        "const real = fetch; window.fetch = async (path, ...rest) => {"
        "if (path === 'budget') await new Promise((go) => (window.go = go)); return real(path, ...rest); }"
    )
    page.find("#stream").click()
    page.until(lambda: "left early" in page.text("#hundred-result"), "they stop, also of a server that is slow to tell")
    assert page.text("#stream") == "Keep sending"
    assert len(page.all("#tiles .tile")) == 100
    page.find("#stream").click()
    page.until(lambda: page.script("const { go } = window; go?.(); return !!go"), "it has told")
    page.until(lambda: page.all("#tiles .tile"), "others come")
    assert page.text("#hundred-result") == "Sending …"


def draw_figure(page: Browser, path: Path) -> None:
    """Draw the README's figure: the first two panels, in few colours."""
    page.resize(1280, 900)
    page.emulate()
    page.screenshot(path)
    first, second = (panel.rect for panel in page.all(".panel")[:2])
    box = (first["x"] - 16, first["y"] - 16, first["x"] + first["width"] + 16, second["y"] + second["height"] + 16)
    with Image.open(path) as whole:
        drawn = whole.crop([round(edge) for edge in box]).convert("RGB")
    drawn.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE).save(path, optimize=True)


def test_it_is_accessible_on_any_screen(page: Browser) -> None:
    choose_sample(page, "fox")
    page.find("#hundred").click()
    page.until(lambda: "left early" in page.text("#hundred-result"), "a hundred are answered")
    for width_px in (1280, 800, 360):
        page.resize(width_px, 900)
        page.until(lambda width_px=width_px: page.script(WIDEST) <= width_px, "the chart follows")
        assert page.script("return document.documentElement.scrollWidth") == width_px
        for scheme in ("light", "dark"):
            page.emulate(prefers_color_scheme=scheme)
            assert [text for text in page.contrasts() if text["ratio"] < text["needed"]] == []
            if folder := os.environ.get("EXITSERVE_SCREENSHOTS"):
                page.screenshot(Path(folder) / f"page-{width_px}-{scheme}.png")
    if folder:
        draw_figure(page, Path(folder) / "page.png")
    nodes = page.accessible_nodes()
    assert [n for n in nodes if n["role"] in {*INTERACTIVE, "image", "heading"} and not n["name"]] == []
    assert {"banner", "navigation", "main", "contentinfo", "status", "slider", "table"} <= {n["role"] for n in nodes}
    reached = set()
    for _ in range(30):
        ActionChains(page.driver).send_keys(Keys.TAB).perform()
        reached.add(page.script("return document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"budget", "file", "hundred", "stream", "bicycle", "Skip to the first picture"} <= reached


def test_a_token_unlocks_the_budget_and_a_lost_server_is_reported(browser: Browser, tmp_path: Path) -> None:
    with running_server(ZOO_BUNDLE, tmp_path / "log", "--lanes", "1", EXITSERVE_ADMIN_TOKEN=TOKEN) as guarded:
        open_page(browser, guarded)
        slider = browser.find("#budget")
        assert not slider.is_enabled()
        assert "Read-only" in browser.text("#budget-note")
        browser.find("#token").send_keys("not-the-token", Keys.ENTER)
        browser.until(lambda: browser.text("#token-note"), "a wrong token is told")
        browser.find("#token").clear()
        browser.find("#token").send_keys("a\u200btoken", Keys.ENTER)
        browser.until(lambda: browser.text("#token-note") == "That is not this server's token.", "so is what is none")
        browser.find("#token").clear()
        browser.find("#token").send_keys(TOKEN, Keys.ENTER)
        browser.until(slider.is_enabled, "the right token unlocks the slider")
        slider.send_keys(Keys.HOME)
        browser.until(lambda: fraction(guarded) < 0.23, "the budget is set")
        assert browser.messages() == []
        assert guarded.stop() == 0
        browser.until(lambda: browser.find("#banner").is_displayed(), "the page notices")
        browser.until(lambda: "does not answer" in browser.text("#banner"), "it says what is wrong")
        assert browser.text("#state") == "no connection"


def test_the_api_documentation_works_offline(browser: Browser, server: ServerProcess) -> None:
    browser.open(server.url + "/docs", prefers_color_scheme="dark")
    browser.until(lambda: len(browser.all(".opblock")) >= 11, "all calls are shown")
    assert [text for text in browser.contrasts() if text["ratio"] < text["needed"]] == []
    browser.find("#operations-status-readyz_readyz_get .opblock-summary-control").click()
    browser.until(lambda: browser.all(".try-out__btn"), "it opens")
    browser.find(".try-out__btn").click()
    browser.until(lambda: browser.all("button.execute"), "it can be tried")
    browser.find("button.execute").click()
    browser.until(
        lambda: '"status": "ready"' in "".join(answer.text for answer in browser.all(".live-responses-table")),
        "the answer is shown",
    )
    assert browser.messages() == []
    assert browser.requests() <= {f"127.0.0.1:{server.port}", ""}
