"""The page under failures: a server that stops, hangs or is replaced, unusual networks, refused images."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from benchmarks import null_bundle
from service.api.page import WEB
from tests.bundles import read_manifest, seal
from tests.service.browser import Browser
from tests.service.pages import ZOO_BUNDLE, choose_sample, give, open_page, sample_names, wait_for_answer
from tests.service.process import ServerProcess, running_server

MAX_PIXELS = 1_000_000
TOKEN = "token-of-the-test"
WIDEST = "return Math.max(...[...document.querySelectorAll('body *')].map((e) => e.getBoundingClientRect().right))"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("page") / "server.log"
    limit = ("--max-pixels", str(MAX_PIXELS))
    with running_server(ZOO_BUNDLE, log, "--budget-fraction", "0.4", "--lanes", "1", *limit) as server:
        yield server
        assert "Traceback" not in log.read_text()


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Browser:
    open_page(browser, server)
    return browser


def sample(name: str = "orange", size: tuple[int, int] = (320, 320)) -> Image.Image:
    with Image.open(WEB / "samples" / f"{name}.png") as picture:
        return picture.convert("RGB").resize(size)


def two_class_bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with two classes whose long names cannot be broken into lines."""
    monkeypatch.setattr(null_bundle, "CLASSES", 2)
    null_bundle.write_null_bundle(folder)
    manifest = read_manifest(folder)
    manifest["name"] = "named-after-its-whole-configuration-" * 3 + "v17"
    manifest["class_names"] = ["Donaudampfschifffahrtsgesellschaft" * 3 + end for end in ("A", "B")]
    seal(folder, manifest)
    return folder


def test_the_last_chosen_image_is_shown(page: Browser, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    sample("snail", (4000, 3000)).save(photo)  # slow to decode
    page.script(
        "window.read = 0; const read = createImageBitmap;"
        "window.createImageBitmap = (...given) => read(...given).finally(() => window.read++)"
    )
    give(page, "pick", photo)
    page.script("document.querySelector('#samples li:last-child button').click()")
    page.until(lambda: page.script("return window.read") == 2, "both are read")
    wait_for_answer(page)
    last = sample_names(page)[-1]
    assert page.find("#samples [aria-pressed=true]").text == last
    assert page.find("#seen").get_dom_attribute("aria-label") == f"{last}, as the network sees it"
    assert f"it shows: {last}" in page.text("#answer") or "right" in page.text("#answer")


def test_a_late_copy_does_not_replace_another_image(page: Browser, tmp_path: Path) -> None:
    page.script(
        "const all = HTMLCanvasElement.prototype, made = all.toBlob; all.toBlob = function (take, ...how) {"
        "made.call(this, (blob) => (window.finish = () => take(blob)), ...how); }"
    )
    sample().save(tmp_path / "a.avif")
    give(page, "pick", tmp_path / "a.avif")
    page.until(lambda: page.script("return !!window.finish"), "a copy is made")
    choose_sample(page, "fox")
    answer = page.text("#answer")
    page.script("window.finish()")
    page.driver.execute_async_script("setTimeout(arguments[0], 200)")
    assert page.text("#answer") == answer
    assert "made by this page" not in page.text("#seen-note")


@pytest.mark.parametrize("kind", ["animated", "many pixels", "unknown format"])
def test_images_only_the_browser_can_read_are_sent_as_a_copy(page: Browser, tmp_path: Path, kind: str) -> None:
    if kind == "animated":
        sample().save(file := tmp_path / "a.gif", save_all=True, append_images=[sample("lion")])
    elif kind == "many pixels":
        sample(size=(1600, 1200)).save(file := tmp_path / "a.jpg")
    else:
        sample().save(file := tmp_path / "a.avif")
    give(page, "pick", file)
    wait_for_answer(page)
    assert page.text("#answer").startswith("orange")
    assert "made by this page, as the file" in page.text("#seen-note")
    [refused] = page.messages()  # the console has only the first attempt
    assert "status of 4" in refused
    choose_sample(page, "fox")
    assert "made by this page" not in page.text("#seen-note")


def test_an_image_that_takes_too_long_to_send_is_sent_smaller(page: Browser, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    sample(size=(900, 900)).save(photo)
    photo.write_bytes(photo.read_bytes() + bytes(6_000_000))  # decoders ignore data after the end
    line = {"offline": False, "latency": 50, "downloadThroughput": 1e6, "uploadThroughput": 1e5}
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", line)
    try:
        give(page, "pick", photo)
        wait_for_answer(page)
    finally:
        page.driver.execute_cdp_cmd(
            "Network.emulateNetworkConditions", line | {"uploadThroughput": -1, "downloadThroughput": -1, "latency": 0}
        )
    assert page.text("#answer").startswith("orange")
    assert "takes too long to send" in page.text("#seen-note")


def test_without_metrics_everything_but_live_shares_works(browser: Browser, server: ServerProcess) -> None:
    """As behind a proxy that does not expose /metrics, as docs/operations.md recommends."""
    refuse = (
        "const real = fetch; window.fetch = (path, options) => "
        "path === 'metrics' ? Promise.resolve(new Response('', { status: 503 })) : real(path, options)"
    )
    script = browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    try:
        open_page(browser, server)
        choose_sample(browser, "fox")
        browser.until(lambda: "cannot be read from here" in browser.text("#shares-note"), "it says so")
        assert not browser.find("#banner").is_displayed()
        browser.find("#budget").send_keys(Keys.ARROW_RIGHT)
        browser.until(lambda: browser.text("#budget-share") != "40 %", "the budget can be set")
        assert browser.messages() == []
    finally:
        browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_answers_of_another_server_are_reported(page: Browser) -> None:
    """For example a proxy that asks the user to sign in again."""
    page.script(
        "window.real = fetch; const form = () => Promise.resolve(new Response('<p>Sign in</p>'));"
        "window.fetch = (path, ...rest) => (path === 'budget' ? form() : real(path, ...rest))"
    )
    page.until(lambda: "Something else answers" in page.text("#banner"), "a form to sign in is no budget")
    page.script("window.fetch = window.real")
    page.until(lambda: "is ready" in page.text("#state"), "it goes on")
    assert not page.find("#banner").is_displayed()


def test_a_network_of_two_classes_with_long_names(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = two_class_bundle(tmp_path / "bundle", monkeypatch)
    with running_server(bundle, tmp_path / "log", "--lanes", "1") as server:
        for width_px in (1280, 360):
            open_page(browser, server, width_px)
            browser.find("#samples li:first-child button").click()
            wait_for_answer(browser)
            browser.find("#hundred").click()
            browser.until(lambda: "left early" in browser.text("#hundred-result"), "a hundred are answered")
            assert browser.script(WIDEST) <= width_px
            assert browser.script("return document.documentElement.scrollWidth") == width_px
        assert browser.messages() == []


def test_a_server_that_hangs_stops_and_is_replaced(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(ZOO_BUNDLE, tmp_path / "log", "--lanes", "1") as server:
        port = ("--port", str(server.port))
        open_page(browser, server)
        server.process.send_signal(signal.SIGSTOP)
        browser.until(lambda: browser.text("#state") == "no connection", "a server that says nothing is noticed")
        server.process.send_signal(signal.SIGCONT)
        browser.until(lambda: "is ready" in browser.text("#state"), "it goes on")
        assert not browser.find("#banner").is_displayed()
        server.stop()

    browser.script("document.querySelector('#samples li:first-child button').click()")
    browser.until(lambda: "does not answer" in browser.text("#answer"), "a picture that cannot be sent is told")
    browser.script("document.querySelector('#hundred').click()")
    browser.until(lambda: "does not answer" in browser.text("#hundred-result"), "neither can a hundred")
    browser.find("#budget").send_keys(Keys.ARROW_LEFT)
    browser.until(lambda: "does not answer" in browser.text("#budget-problem"), "a budget that is not set is told")
    assert [text for text in browser.messages() if "Failed to load resource" not in text] == []

    with running_server(ZOO_BUNDLE, tmp_path / "log", "--lanes", "1", *port, EXITSERVE_ADMIN_TOKEN=TOKEN):
        browser.until(lambda: browser.find("#unlock").is_displayed(), "it finds a server again, which asks for a token")
        browser.find("#token").send_keys(TOKEN, Keys.ENTER)
        browser.until(lambda: browser.text("#budget-problem") == "", "what was wrong is gone")
        browser.find("#budget").send_keys(Keys.ARROW_LEFT)
        browser.until(lambda: browser.text("#budget-share") == "99 %", "and the budget is set")
    with running_server(two_class_bundle(tmp_path / "bundle", monkeypatch), tmp_path / "log", *port):
        browser.until(lambda: browser.text("#state") == "another network", "it notices another network")
        assert "Reload the page" in browser.text("#banner")
        padding = browser.script("return getComputedStyle(document.documentElement).scrollPaddingTop")
        assert padding == "144px"  # what has the focus scrolls to below the banner
        browser.find("#banner a").click()
        browser.until(lambda: "named-after" in browser.text("#state"), "and shows it when reloaded")
        assert len(browser.all("#exits tr")) == 2
        browser.script(
            "const real = fetch; window.fetch = (path, ...rest) => "
            "path === 'metrics' ? Promise.resolve(new Response('', { status: 404 })) : real(path, ...rest)"
        )
    browser.until(lambda: browser.text("#state") == "no connection", "the server is gone")
    with running_server(ZOO_BUNDLE, tmp_path / "log", "--lanes", "1", *port):
        browser.until(lambda: browser.text("#state") == "another network", "it notices without the metrics, too")


def test_dragged_text_is_ignored_and_a_dragged_file_is_accepted(page: Browser) -> None:
    taken = page.script(
        "return [(data) => data.setData('text/plain', 'a token'), (data) => data.items.add(new File([''], 'a.png'))]"
        ".map((fill) => { const data = new DataTransfer(); fill(data);"
        "const over = new DragEvent('dragover', { dataTransfer: data, bubbles: true, cancelable: true });"
        "document.body.dispatchEvent(over);"
        "return [over.defaultPrevented, !document.getElementById('dropping').hidden]; })"
    )
    assert taken == [[False, False], [True, True]]


def test_a_folder_is_refused_without_reporting_a_lost_server(page: Browser, tmp_path: Path) -> None:
    data = {"items": [], "files": [str(tmp_path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})
    page.until(lambda: "The file cannot be read. It is a folder" in page.text("#answer"), "it is told")
    assert page.messages() == []


def test_a_page_that_stays_open_keeps_few_readings(page: Browser) -> None:
    kept = page.driver.execute_async_script(
        "import('/web/traffic.js').then(({ Traffic }) => { const traffic = new Traffic(1), done = arguments[0];"
        'const read = (n) => traffic.read(`exitserve_exits_total{exit="1",reason="final"} ${n}.0\\n`);'
        "const kept = [], keep = () => kept.push(traffic.servers.get(undefined).length, traffic.live.answers);"
        "for (let i = 0; i < 500; i++) read(7);"
        "keep();"
        "for (let i = 8; i < 1000; i++) { read(i); read(i); }"
        "keep();"
        "read(3);"
        "keep();"
        "done(kept); })"
    )
    assert kept == [1, 0, 301, 300, 1, 0]


def test_servers_behind_a_load_balancer_are_counted_separately(page: Browser) -> None:
    told = page.driver.execute_async_script(
        "import('/web/traffic.js').then(({ Traffic }) => { const traffic = new Traffic(2), done = arguments[0];"
        "const read = (server, ...counts) => traffic.read(counts.map((n, i) =>"
        '`exitserve_exits_total{exit="${i + 1}",reason="final"} ${n}\\n`).join("") +'
        "`process_start_time_seconds ${server}\\n`);"
        "read('1.5e+09', 900, 100); read('1.6e+09', 10, 10); const told = [traffic.live];"
        "read('1.5e+09', 904, 102); read('1.6e+09', 12, 12); told.push(traffic.live);"
        "traffic.restart(); told.push(traffic.live);"
        "for (let i = 0; i < 100; i++) read(i, 1, 1);"
        "done([...told, traffic.servers.size]); })"
    )
    assert told[:3] == [{"answers": 0, "shares": None}, {"answers": 10, "shares": [0.6, 0.4]}, told[0]]
    assert told[3] < 100, "servers that are gone are forgotten"


def test_numbers_are_formatted_for_reading(page: Browser) -> None:
    told = page.driver.execute_async_script(
        "import('/web/words.js').then(({ score, millions, percent }) => arguments[0]("
        "[score(-0.001), score(-0.01), millions(0.0012), millions(12345.6), percent(-2e-16), percent(-0.1, 1)]))"
    )
    assert told == ["0.00", "-0.01", "0.0012 M", "12,346 M", "0 %", "-10.0 %"]
