"""Cross-origin requests from a real browser, on a page served by another server."""

import base64
import functools
import http.client
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.page import WEB
from service.settings import Settings
from tests.bundles import tiny_bundle
from tests.service.browser import Browser
from tests.service.process import ServerProcess, running_server

PICTURE = base64.b64encode((WEB / "samples" / "fox.png").read_bytes()).decode()
ASK = """
const [url, method, path, picture, done] = arguments;
const bytes = Uint8Array.from(atob(picture), (c) => c.charCodeAt(0));
const [body, type] = method === "PUT" ? ['{"fraction": 0.5}', "application/json"] : [bytes, "image/png"];
const options = method === "GET" ? {} : { method, body, headers: { "Content-Type": type } };
fetch(url + path, options).then(
  async (response) => done([response.status, await response.text(), response.headers.get("X-Request-ID")]),
  (error) => done([0, String(error), null]),
);
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The origin of a page on another server."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "index.html").write_text("<title>shop</title>")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("origins") / "bundle")


def ask(browser: Browser, server: ServerProcess, method: str, path: str) -> Any:
    return browser.driver.execute_async_script(ASK, server.url, method, path, PICTURE)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_pages_of_an_allowed_origin_may_classify_but_not_set_the_budget(
    browser: Browser, shop: str, bundle: Path, tmp_path: Path, workers: str
) -> None:
    options = ("--lanes", "1", "--allow-origins", f"https://other.example {shop}", "--http-workers", workers)
    with running_server(bundle, tmp_path / "log", *options) as server:
        browser.open(shop)
        for _ in range(2):  # the second on an open connection
            status, answer, request_id = ask(browser, server, "POST", "/classify")
            assert (status, '"label"' in answer, bool(request_id)) == (200, True, True)
        status, answer, _ = ask(browser, server, "POST", "/classify?top_k=0")
        assert (status, "bad-parameter" in answer) == (422, True), "a refusal can be read, too"
        assert ask(browser, server, "POST", "/classify/stream")[0] == 200
        assert ask(browser, server, "GET", "/model")[0] == 200
        assert ask(browser, server, "PUT", "/budget")[0] == 0
        assert httpx.get(server.url + "/budget").json()["fraction"] == 1.0
        assert httpx.put(server.url + "/budget", json={"fraction": 0.6}).status_code == 200
        assert server.stop() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_pages_of_other_origins_may_not_classify(browser: Browser, shop: str, bundle: Path, tmp_path: Path) -> None:
    for allowed in ("", "https://other.example"):
        with running_server(bundle, tmp_path / "log", "--lanes", "1", "--allow-origins", allowed) as server:
            browser.open(shop)
            assert ask(browser, server, "POST", "/classify")[0] == 0
            assert ask(browser, server, "GET", "/model")[0] == 0


def test_clients_without_an_origin_are_not_affected(bundle: Path, tmp_path: Path) -> None:
    with running_server(bundle, tmp_path / "log", "--lanes", "1", "--allow-origins", "*") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        for origin, named in ((None, None), ("https://any.example", "*"), (None, None)):
            headers = {"Content-Type": "image/png"} | ({"Origin": origin} if origin else {})
            connection.request("POST", "/classify", base64.b64decode(PICTURE), headers)
            response = connection.getresponse()
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (200, named)
            response.read()
        connection.close()


@pytest.mark.parametrize("wrong", ["shop.example", "https://shop.example/path", "https://Shop.example", "null"])
def test_an_invalid_origin_is_refused_by_name(wrong: str) -> None:
    with pytest.raises(ValueError, match="is not an origin: write scheme"):
        Settings(allow_origins=wrong)
