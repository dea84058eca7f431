"""The page at `/`, and the actions of its users."""

import base64
from pathlib import Path

from tests.service.browser import Browser
from tests.service.process import REPOSITORY, ServerProcess

ZOO_BUNDLE = REPOSITORY / "models" / "zoo" / "cifar100-msdnet"
DROP = """
const data = new DataTransfer();
data.items.add(new File([Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0))], arguments[1]));
const event = arguments[2] === "paste"
  ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
  : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
document.body.dispatchEvent(event);
"""


def open_page(browser: Browser, server: ServerProcess, width_px: int = 1280, **media: str) -> None:
    browser.open(server.url + "/", width_px, **media)
    browser.until(lambda: "is ready" in browser.text("#state"), "the page starts")


def choose_sample(page: Browser, name: str) -> None:
    page.find(f"#samples li:nth-child({sample_names(page).index(name) + 1}) button").click()
    wait_for_answer(page)


def sample_names(page: Browser) -> list[str]:
    return [button.text for button in page.all("#samples button")]


def wait_for_answer(page: Browser) -> None:
    page.until(lambda: "Left at exit" in page.text("#answer"), "an answer comes")


def give(page: Browser, way: str, file: Path) -> None:
    if way == "pick":
        page.find("#file").send_keys(str(file))
    else:
        page.script(DROP, base64.b64encode(file.read_bytes()).decode(), file.name, way)
