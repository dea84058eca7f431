"""For any request to `/classify`, the fast path and the application give, count and log the same.

How its bytes arrive decides the path: complete ones take the fast path; those in two pieces go to the application.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.api.direct import Desk
from service.logs import JsonFormatter
from tests.bundles import random_images
from tests.service.apps import encoded, png
from tests.service.images.test_images import png_bomb
from tests.service.sockets import Here, serving
from tests.waiting import wait_until

IMAGES = random_images(3, seed=72)
BODY = png(IMAGES[0])
PNG_TYPE = "Content-Type: image/png"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"
LARGE = encoded(np.tile(IMAGES[2], (12, 12, 1)), "PNG")
BODIES = {
    "plain PNG": BODY,
    "PNG with a tail": BODY + bytes(100),
    "interlaced": encoded(IMAGES[1], "PNG", interlace=1),
    "grey": encoded(IMAGES[1][..., 0], "PNG"),
    "JPEG": encoded(IMAGES[1], "JPEG"),
    "GIF": encoded(IMAGES[1], "GIF"),
    "WebP": encoded(IMAGES[1], "WEBP"),
    "BMP": encoded(IMAGES[1], "BMP"),
    "large": LARGE,
    "large, cut short": LARGE[: len(LARGE) // 2],
    "empty": b"",
    "text": b"no image",
    "cut short": BODY[:-40],
    "header alone": BODY[:33],
    "bomb": png_bomb(10_000),
    "zeros": bytes(1000),
}
QUERIES = [
    *("?", "?&&", "?top_k=3", "?top_k=10", "?exit=2", "?min_confidence=0.5", "?max_mflops=1e9", "?deadline_ms=60000"),
    *("?top_k=0", "?top_k=11", "?top_k=%33", "?top_k=+3", "?top_k=nan", "?exit=1&min_confidence=1", "?exit=1&exit=1"),
    *("?min_confidence=nan", "?min_confidence=inf", "?min_confidence=1e-400", "?max_mflops=inf", "?max_mflops=-1"),
    *("?deadline_ms=0", "?deadline_ms=1e999", "?deadline_ms=.5e5", "?top_k", "?=", "?%00=1", "?topk=1;exit=2"),
    *("?top_k=\xe9", "?top_k=1#part", "?a=" + "b" * 3000, "?exit=2?exit=3", "?exit=%", "?exit=%zz"),
]
FIELDS = [
    [PNG_TYPE, "X-Request-ID: mine-1"],
    [PNG_TYPE, "X-Request-ID: not mine"],
    [PNG_TYPE, "X-Request-ID: a", "X-Request-ID: b"],
    [PNG_TYPE, f"traceparent: {TRACE}-01"],
    [PNG_TYPE, f"traceparent: {TRACE}-01-more"],
    [PNG_TYPE, f"traceparent: {TRACE.replace('00-', 'cc-', 1)}-01-more"],
    [PNG_TYPE, f"traceparent: {TRACE.upper()}-01"],
    [PNG_TYPE, f"traceparent: {TRACE}-01", f"traceparent: {TRACE}-00"],
    ["content-type:image/png"],
    ["Content-Type: \timage/png\t "],
    ["Content-Type: image/PNG"],
    ["Content-Type: image/png; charset=binary"],
    ["Content-Type: application/octet-stream"],
    ["Content-Type: text/plain"],
    ["Content-Type:"],
    [],
    [PNG_TYPE, "Content-Type: text/plain"],
    ["Content-Type: text/plain", PNG_TYPE],
    [PNG_TYPE, "Cookie: a=\xe9", "X-Odd: \x80\xff"],
    [PNG_TYPE, "Accept: text/html", "Range: bytes=0-1", "If-None-Match: *", "Accept-Encoding: gzip"],
    [PNG_TYPE, "Connection: close"],
    [PNG_TYPE, "Connection: keep-alive, x"],
    [PNG_TYPE, "Expect: 200-ok"],
    [PNG_TYPE, "Upgrade: h2c"],
    [PNG_TYPE, "Content-Encoding: gzip"],
    [PNG_TYPE, "Host: another"],
]
NOT_COUNTS = ("batch", "latency", "process")
CASES = [
    *((name, "", [PNG_TYPE]) for name in BODIES),
    *(("plain PNG", query, [PNG_TYPE]) for query in QUERIES),
    *(("plain PNG", "", fields) for fields in FIELDS),
]


@pytest.fixture(scope="module")
def here(folder: Path) -> Iterator[Here]:
    with serving(folder, budget_fraction=1.0) as served:
        yield served


def written(body: bytes, query: str, fields: list[str]) -> bytes:
    lines = [f"POST /classify{query} HTTP/1.1", "Host: localhost", *fields, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def counts(here: Here) -> dict[str, float]:
    """All metrics that count requests, by name and labels."""
    text = httpx.get(here.url + "/metrics").text
    return {
        f"{sample.name} {sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.endswith(("_total", "_count")) and not any(word in sample.name for word in NOT_COUNTS)
    }


def told(here: Here, pieces: list[bytes], caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """Send a request; returns answer, log and counts, without times and ids, which always differ."""
    caplog.clear()
    before = counts(here)
    with contextlib.closing(here.connect()) as line:
        line.send(pieces[0])
        if len(pieces) > 1:
            in_work = lambda: here.app.lifecycle.requests_in_flight or caplog.records  # noqa: E731
            wait_until("the server has the first", in_work)
            with contextlib.suppress(ConnectionError):
                line.send(pieces[1])
        status, headers, document = line.receive()
    wait_until("it is logged", lambda: any(record.name == "service.access" for record in caplog.records))
    [record] = [record for record in caplog.records if record.name == "service.access"]
    logged = json.loads(JsonFormatter().format(record))
    assert document.get("request_id") == headers["x-request-id"] == logged["request_id"]
    if headers["x-request-id"] not in ("mine-1", "a", "b"):
        headers["x-request-id"] = logged["request_id"] = document["request_id"] = "new"
    n_bytes = int(headers.pop("content-length"))
    assert logged.pop("response_bytes") == n_bytes
    for named in (headers.pop("date"), document.pop("timings", None), logged.pop("time"), logged.pop("duration_ms")):
        assert named is None or named
    after = counts(here)
    return {
        "status": status,
        "headers": headers,
        "document": document,
        "log": logged,
        "counted": {name: round(after[name] - before[name], 6) for name in after if after[name] != before[name]},
    }


@pytest.mark.parametrize(("name", "query", "fields"), CASES)
def test_both_paths_answer_count_and_log_the_same(
    here: Here, name: str, query: str, fields: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    data = written(BODIES[name], query, fields)
    at = data.index(b"\r\n\r\n") + 4
    assert told(here, [data], caplog) == told(here, [data[:at], data[at:]], caplog)


def test_whole_and_split_requests_take_different_paths(
    here: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    entered: list[str] = []
    take = Desk.take

    def seen(desk: Desk, visit: Any, body: bytes) -> None:
        entered.append(visit.request_id)
        take(desk, visit, body)

    monkeypatch.setattr(Desk, "take", seen)
    data = written(BODY, "", [PNG_TYPE])
    told(here, [data], caplog)
    told(here, [data[:-10], data[-10:]], caplog)
    assert len(entered) == 1
