"""The access log: one JSON line per request, with the ids by which it can be found."""

import json
import logging
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.gate import LoggedGate
from service.api.lifecycle import is_traceparent
from service.logs import JsonFormatter
from tests.bundles import random_images
from tests.service.apps import PNG, Http, build_app, png, serving
from tests.service.process import running_server

BODY = png(random_images(1, seed=23)[0])
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture(scope="module")
def http(folder: Path) -> Iterator[Http]:
    with serving(build_app(folder)) as client:
        yield client


def line_of(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    [record] = [record for record in caplog.records if record.name == "service.access"]
    line = JsonFormatter().format(record)
    assert "\n" not in line
    caplog.clear()
    document: dict[str, Any] = json.loads(line)
    assert document["time"].endswith("+00:00")
    return document


def test_every_request_has_one_line_with_its_outcome(http: Http, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.access")
    response = http.post("/classify?exit=2", content=BODY, headers={**PNG, "traceparent": TRACEPARENT})
    line = line_of(caplog)
    assert {key: line[key] for key in ("method", "path", "status", "exit", "reason", "client", "level")} == {
        "method": "POST",
        "path": "/classify",
        "status": 200,
        "exit": 2,
        "reason": "pinned",
        "client": "127.0.0.1",
        "level": "info",
    }
    assert line["request_id"] == response.headers["x-request-id"]
    assert line["traceparent"] == response.headers["traceparent"] == TRACEPARENT
    assert line["response_bytes"] == len(response.content)
    assert line["duration_ms"] >= response.json()["timings"]["total_ms"]
    assert line["mflops"] == response.json()["mflops"]
    assert line["confidence"] == pytest.approx(response.json()["confidence"], abs=1e-6)
    http.post("/classify", content=b"no image", headers=PNG)
    assert {"status": 400, "problem": "not-an-image", "traceparent": None}.items() <= line_of(caplog).items()
    http.post("/classify/batch", files=[("image", ("a.png", BODY)), ("image", ("b.png", b"none"))])
    assert {"path": "/classify/batch", "images": 2, "answered": 1}.items() <= line_of(caplog).items()
    http.post("/classify/stream?exit=3", content=BODY, headers=PNG)
    assert {"path": "/classify/stream", "exit": 3}.items() <= line_of(caplog).items()
    http.request("HEAD", "/model")
    assert {"method": "HEAD", "status": 200, "response_bytes": 0}.items() <= line_of(caplog).items()
    http.get("/nowhere%0A")
    assert {"path": "/nowhere\n", "status": 404}.items() <= line_of(caplog).items()


def test_lines_fit_into_a_pipe_buffer_for_any_path(http: Http, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.access")
    http.get("/" + "%01" * 10_000)  # the longest when escaped as JSON
    [record] = [record for record in caplog.records if record.name == "service.access"]
    assert len(JsonFormatter().format(record).encode()) < select.PIPE_BUF
    assert line_of(caplog)["path"] == "/" + "\x01" * 199 + "..."


def test_successful_probes_are_logged_at_debug_level(http: Http, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "service.access")
    for path in ("/healthz", "/readyz", "/metrics"):
        http.get(path)
        assert line_of(caplog)["level"] == "debug"
    http.post("/readyz")
    assert {"status": 405, "level": "info"}.items() <= line_of(caplog).items()


def test_when_off_it_is_not_installed(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.access")
    app = build_app(folder, access_log="off")
    assert not isinstance(app, LoggedGate)
    with serving(app) as client:
        assert client.post("/classify", content=BODY, headers=PNG).status_code == 200
    assert [record for record in caplog.records if record.name == "service.access"] == []


@pytest.mark.parametrize(
    ("header", "valid"),
    [
        (TRACEPARENT, True),
        ("cc" + TRACEPARENT[2:] + "-what-comes-later", True),
        (TRACEPARENT + "-extra", False),
        ("ff" + TRACEPARENT[2:], False),
        (TRACEPARENT.upper(), False),
        ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01", False),
        (TRACEPARENT[:-1], False),
        ("", False),
    ],
)
def test_a_valid_traceparent_is_returned(http: Http, header: str, valid: bool) -> None:
    assert is_traceparent(header.encode()) == valid
    response = http.get("/healthz", headers={"traceparent": header})
    assert response.headers.get("traceparent") == (header if valid else None)
    assert response.headers["x-request-id"]


def test_a_server_logs_only_json_lines(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running_server(folder, log) as server:
        named = {"X-Request-ID": "mine-1", **PNG}
        assert httpx.post(server.url + "/classify", content=BODY, headers=named).status_code == 200
        assert server.stop() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    [access] = [line for line in lines if line["logger"] == "service.access"]
    assert access["request_id"] == "mine-1"
    assert any(line["message"].startswith("stopped: 1 answered") for line in lines)


def test_an_exception_stays_on_one_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "failed: %s", ("é",), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "\n" not in line
    document = json.loads(line)
    assert document["message"] == "failed: é"
    assert "ValueError: first\nsecond" in document["exception"]
