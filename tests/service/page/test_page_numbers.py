"""The numbers that the page shows are those that the server has told it."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest

from tests.service.browser import Browser
from tests.service.pages import ZOO_BUNDLE, choose_sample, open_page
from tests.service.process import ServerProcess, running_server

# Keeps the answers to the page's own calls in `said`, by the call.
LISTEN = """
window.said = { 'classify': [], 'classify/stream': [] };
const real = fetch;
window.fetch = async (path, ...rest) => {
  const response = await real(path, ...rest);
  const call = String(path).split('?')[0];
  if (!(call in said)) return response;
  said[call].push(await response.text());
  return new Response(said[call].at(-1), response);
};
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("page") / "server.log"
    with running_server(ZOO_BUNDLE, log, "--budget-fraction", "0.4", "--lanes", "1") as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Browser:
    open_page(browser, server)
    browser.script(LISTEN)
    return browser


def said(page: Browser, call: str, n: int) -> list[str]:
    page.until(lambda: page.script("return said[arguments[0]].length", call) == n, "the answers are kept")
    return page.script("return said[arguments[0]]", call)


def document(server: ServerProcess, path: str) -> Any:
    return httpx.get(f"{server.url}/{path}").raise_for_status().json()


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def millions(mflops: float) -> str:
    return f"{mflops:.1f} M"


def widths_percent(page: Browser, selector: str) -> list[float]:
    return page.script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => parseFloat(e.style.width))", selector
    )


def tenths(shares: Sequence[float]) -> Any:
    """Shares in percent, to a tenth."""
    return pytest.approx([100 * share for share in shares], abs=0.051)


def follow(page: Browser, server: ServerProcess, fraction: float) -> Any:
    """Set the budget, wait until the page shows it, and return the document of GET /budget."""
    httpx.put(server.url + "/budget", json={"fraction": fraction}).raise_for_status()
    page.until(lambda: page.text("#budget-share") == percent(fraction), "the page follows the server")
    return document(server, "budget")


def test_a_pictures_way_and_cost_are_as_told(page: Browser, server: ServerProcess) -> None:
    follow(page, server, 0.4)
    choose_sample(page, "fox")
    lines = [json.loads(line) for line in said(page, "classify/stream", 1)[0].splitlines()]
    answer, costs = lines[-1], [exit["executed_mflops"] for exit in document(server, "model")["exits"]]
    taken, full = answer["exit"], costs[-1]
    assert (answer["reason"], 1 < taken < len(costs)) == ("confident", True)
    by_exit = {line["exit"]: line for line in lines}
    assert list(by_exit) == list(range(1, taken + 1))
    shown = {
        column: [cell.text for cell in page.all(f"#exits {column}")]
        for column in (".guess", ".against", ".so-far", ".then")
    }
    n_saved = len(costs) - taken
    assert shown == {
        ".guess": [f"{x['label']} {percent(x['confidence'])}" for x in by_exit.values()] + [""] * n_saved,
        ".against": [f"{x['score']:.2f}, needs {x['threshold']:.2f}" for x in by_exit.values()] + [""] * n_saved,
        ".so-far": [f"{millions(cost)} {percent(cost / full)}" for cost in costs],
        ".then": ["not sure: goes on ↓"] * (taken - 1) + ["sure: leaves ✓"] + ["never run"] * n_saved,
    }
    told = page.text("#answer")
    assert told.startswith(f"{answer['label']} {percent(answer['confidence'])} confident")
    assert told.endswith(
        f"Left at exit {taken} of {len(costs)}. Exit {taken} was sure enough: its score of {answer['score']:.2f} "
        f"reached the threshold of {answer['threshold']:.2f}. The other {n_saved} stages were never run."
    )
    share = answer["mflops"] / full
    assert answer["mflops"] == pytest.approx(costs[taken - 1])
    assert page.text("#cost-note") == (
        f"{millions(answer['mflops'])} of the full network's {millions(full)}: {percent(1 - share)} saved"
    )
    assert widths_percent(page, "#cost-bar") == tenths([share])
    assert page.text("#timing") == f"The server took {answer['timings']['total_ms']:.1f} ms."


def test_the_budgets_numbers_are_the_servers(page: Browser, server: ServerProcess) -> None:
    state = follow(page, server, 0.37)
    expected = state["expected"]
    assert page.text("#budget-accuracy") == percent(expected["accuracy"], 1)
    assert page.text("#fact-budget") == millions(state["average_mflops"])
    assert page.text("#fact-full") == millions(document(server, "model")["exits"][-1]["executed_mflops"])
    assert widths_percent(page, "#shares .expected") == tenths(expected["exit_shares"])
    numbers = [cell.text.split(",")[0] for cell in page.all("#shares .numbers")]
    assert numbers == [percent(share) for share in expected["exit_shares"]]
    known = [f"{threshold:.2f}" for threshold in state["thresholds"] if threshold is not None]
    shown = [cell.text for cell in page.all("#shares .threshold")]
    assert known
    assert shown[: len(known)] == known

    choose_sample(page, "snail")
    rolling = document(server, "budget")["rolling"]
    page.until(lambda: page.text("#fact-rolling") == millions(rolling["average_mflops"]), "what was spent is shown")
    assert page.text("#rolling-images").split()[1] == str(rolling["images"])

    page.script("arguments[0].value = 55; arguments[0].dispatchEvent(new Event('input'))", page.find("#budget"))
    page.until(lambda: document(server, "budget")["fraction"] == pytest.approx(0.55), "the slider's value is sent")


def test_the_hundreds_numbers_are_counted_from_their_answers(page: Browser, server: ServerProcess) -> None:
    state = follow(page, server, 0.43)
    page.find("#hundred").click()
    page.until(lambda: "left early" in page.text("#hundred-result"), "a hundred are answered")
    answers = [json.loads(text) for text in said(page, "classify", 100)]
    costs = [exit["executed_mflops"] for exit in document(server, "model")["exits"]]
    exits = Counter(answer["exit"] for answer in answers)
    by_exit = [exits[1 + i] for i in range(len(costs))]
    assert [int(cell.text) for cell in page.all("#tiles .count")] == by_exit
    assert (
        page.script("return [...document.querySelectorAll('#tiles .set')].map((set) => set.childElementCount)")
        == by_exit
    )

    titles = page.script("return [...document.querySelectorAll('.tile')].map((tile) => tile.title)")
    truths, labels = zip(*((title + f", taken for {title}").split(", taken for ")[:2] for title in titles), strict=True)
    assert Counter(labels) == Counter(answer["label"].replace("_", " ") for answer in answers)
    n_right = sum(truth == label for truth, label in zip(truths, labels, strict=True))
    mean, full = sum(answer["mflops"] for answer in answers) / 100, costs[-1]
    assert page.text("#hundred-result").splitlines()[0] == (
        f"{100 - by_exit[-1]} of 100 pictures left early. They cost {millions(mean)} on average, "
        f"{percent(1 - mean / full)} less than the full network. {n_right} were answered right."
    )
    assert [meter.text for meter in page.all("#meters .meter b")] == [
        f"{millions(mflops)} ({percent(mflops / full)})" for mflops in (full, state["average_mflops"], mean)
    ]
    page.until(lambda: "the last 100 answers, anyone's" in page.text("#shares-note"), "they are counted as live")
    assert [cell.text.split(", live ")[1] for cell in page.all("#shares .numbers")] == [f"{n} %" for n in by_exit]
    assert widths_percent(page, "#shares .live") == by_exit


def test_what_a_latency_target_does_and_why_images_left_are_told(page: Browser) -> None:
    answer = {"exit": 2, "exits": 3, "score": 1.256, "threshold": 1.0}
    latency = {
        "target_ms": 50,
        "p95_ms": 61.6,
        "limited": True,
        "limited_since": "2026-01-02T03:04:05",
        "at_lowest": True,
    }
    latency |= {"working": {"fraction": 0.25, "accuracy": 0.7012}}
    told = page.driver.execute_async_script(
        "import('/web/words.js').then(({ aboutLatency, needs, whyItLeft }) => arguments[2]("
        "[aboutLatency(arguments[0]), aboutLatency({ ...arguments[0], limited: false, p95_ms: null }),"
        "whyItLeft({ ...arguments[1], reason: 'confident' }),"
        "whyItLeft({ ...arguments[1], threshold: null, exits: 2, reason: 'confident' }),"
        "whyItLeft({ ...arguments[1], reason: 'deadline' }), whyItLeft({ ...arguments[1], reason: 'pinned' }),"
        "needs(0.256, false), needs(null, true), needs(null, false)]))",
        latency,
        answer,
    )
    aim = "95 of 100 pictures should be answered within 50 ms"
    assert told == [
        f"{aim} (now: 62 ms). At this budget the load would take longer, so since 03:04:05 the server has gone below "
        "it: it works at 25 % of the full network, with 70.1 % expected to be right, the lowest it can go: further "
        "load is refused.",
        f"{aim}. At present this budget is fast enough.",
        "Exit 2 was sure enough: its score of 1.26 reached the threshold of 1.00. The last stage was never run.",
        "Exit 2 was sure enough: its score of 1.26 is enough, as any would be at this budget.",
        "The request's time was up after exit 2, so it got the best answer so far.",
        "The request asked for exit 2.",
        "0.26",
        "any",
        "none will do",
    ]
