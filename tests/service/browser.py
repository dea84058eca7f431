"""A real headless Chromium, and queries about the page it shows."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE_S = 60  # for busy machines; waits end as soon as their condition holds
INTERACTIVE = {"button", "checkbox", "combobox", "link", "slider", "textbox", "DisclosureTriangle"}

# The contrast of every visible text, with the background composed from its ancestors.
CONTRASTS = """
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const over = ([r, g, b, a], ground) => [r, g, b].map((x, i) => (x * a + ground[i] * (255 - a)) / 255);
const luminance = (colour) => {
  const [r, g, b] = colour.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  if (!element) return [255, 255, 255];
  return over(rgba(getComputedStyle(element).backgroundColor), ground(element.parentElement));
};
const opacity = (element) => (element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1);
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.textContent.trim();
  const element = walker.currentNode.parentElement;
  const off = element.closest(":disabled, [aria-disabled=true], noscript");
  if (!text || off || !element.checkVisibility({ visibilityProperty: true })) continue;
  const style = getComputedStyle(element);
  const behind = ground(element);
  const [r, g, b, a] = rgba(style.color);
  const shown = over([r, g, b, a * opacity(element)], behind);
  const [light, dark] = [luminance(shown), luminance(behind)].sort((x, y) => y - x);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  found.push({ text: text.slice(0, 60), ratio: (light + 0.05) / (dark + 0.05), needed: large ? 3 : 4.5 });
}
return found;
"""


class Browser:
    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str, width_px: int = 1280, height_px: int = 900, **media: str) -> None:
        """Show a page; `media` are media features, such as prefers_color_scheme="dark"."""
        self.resize(width_px, height_px)
        self.emulate(**media)
        self.driver.get("about:blank")
        self.messages()
        self.requests()
        self.driver.get(url)

    def resize(self, width_px: int, height_px: int) -> None:
        size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def touch(self, element: WebElement, path_px: Sequence[tuple[int, int]]) -> float:
        """Touch the middle of an element, move through these offsets from there, and release.

        Returns the page's scroll position at the start of the touch, in pixels.
        """
        self.script("arguments[0].scrollIntoView({ block: 'center', behavior: 'instant' })", element)
        scrolled_px: float = self.script("return scrollY")
        box = self.script("return arguments[0].getBoundingClientRect()", element)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for i, (dx, dy) in enumerate(path_px):
            finger = {"type": "touchMove" if i else "touchStart", "touchPoints": [{"x": x + dx, "y": y + dy}]}
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", finger)
        self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        return scrolled_px

    def emulate(self, **media: str) -> None:
        media = {"prefers_color_scheme": "light", "prefers_reduced_motion": "reduce", **media}
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def find(self, css: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def text(self, css: str) -> str:
        return self.find(css).text

    def script(self, source: str, *arguments: Any) -> Any:
        return self.driver.execute_script(source, *arguments)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until `condition()` is true, and return it."""
        return WebDriverWait(self.driver, PATIENCE_S, 0.05).until(
            lambda _: condition(), f"{what}; the page says: {self.text('body')}"
        )

    def messages(self) -> list[str]:
        """New messages of the console, including policy violations and failed requests."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """Hosts of all requests since the last call; empty for data and blob URLs."""
        sent = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [entry["params"]["request"]["url"] for entry in sent if entry["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).netloc for url in urls}

    def accessible_nodes(self) -> list[dict[str, Any]]:
        """Role and name of everything that is exposed to assistive technology."""
        tree = self.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        return [
            {"role": node["role"]["value"], "name": node.get("name", {}).get("value", "")}
            for node in tree
            if not node["ignored"]
        ]

    def contrasts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.script(CONTRASTS)
        return found

    def screenshot(self, path: Path) -> None:
        """Save a screenshot of the whole page at its current width."""
        width, height, before = self.script("return [innerWidth, document.documentElement.scrollHeight, innerHeight]")
        self.resize(width, height)
        self.driver.save_screenshot(str(path))
        self.resize(width, before)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium; skips the test if it or its driver is not installed."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.add_argument("--headless=new")
    options.add_argument("--hide-scrollbars")
    options.add_argument("--disable-dev-shm-usage")  # containers have little shared memory
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # needed to run as root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(driver_path))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
