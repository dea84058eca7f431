"""Requests that are unfinished when the drain time ends get a 503, on every route and at every stage of processing."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from service.api.delivery import Delivery
from service.engine.rows import Step
from tests.bundles import random_images, tiny_bundle
from tests.service.api.test_delivery import keep_busy
from tests.service.apps import png
from tests.service.process import running_server
from tests.service.sockets import Here, Line, request, serving
from tests.waiting import LIMIT_S, wait_until

BODY = png(random_images(1, seed=43)[0])
DRAIN_S = 1.0
STEP = Step(0, "zero", 0.5, ((0, 0.5),), 1, 1.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("cut") / "bundle")


@pytest.fixture
def brief(folder: Path) -> Iterator[Here]:
    """A server with a drain time of 0.1 s."""
    with serving(folder) as served:
        served.server.drain_s = 0.1
        yield served


def to(method_and_path: str, kind: str, n_bytes: int) -> bytes:
    head = f"{method_and_path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {n_bytes}\r\n\r\n"
    return head.encode()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unfinished_bodies_get_503_when_the_drain_ends(folder: Path, tmp_path: Path, workers: str) -> None:
    arguments = ("--drain-s", str(DRAIN_S), "--body-timeout-s", "3600", "--http-workers", workers)
    form = "multipart/form-data; boundary=XX"
    with running_server(folder, tmp_path / "log", *arguments) as server, contextlib.ExitStack() as stack:
        lines = []
        for head in (
            to("POST /classify", "image/png", len(BODY)),
            to("POST /classify", form, len(BODY)),
            to("POST /classify/stream", "image/png", len(BODY)),
            to("POST /classify/batch", form, len(BODY)),
            to("PUT /budget", "application/json", 50),
        ):
            sock = socket.create_connection(("127.0.0.1", server.port), LIMIT_S)
            lines.append(stack.enter_context(contextlib.closing(Line(sock))))
            lines[-1].send(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
            assert sock.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")  # it is accepted
            lines[-1].send(b"{")
        told_s = monotonic()
        server.process.terminate()
        for line in lines:
            status, headers, document = line.receive()
            assert (status, headers["content-type"]) == (503, "application/problem+json")
            assert document["type"] == "urn:exitserve:problem:not-ready"
            assert "drain time is over" in document["detail"]
            assert headers["x-request-id"] == document["request_id"]
            assert headers["connection"] == "close"
            assert line.ended()
        assert monotonic() - told_s >= DRAIN_S
        assert server.process.wait(LIMIT_S) == 1
        assert monotonic() - told_s < DRAIN_S + 2.0, "a second later at most, and one for a busy machine"
    log = (tmp_path / "log").read_text()
    assert "requests were not answered" in log
    assert "Traceback" not in log
    assert log.count('"status":503,') == len(lines)


def drain(here: Here) -> None:
    here.loop.call_soon_threadsafe(here.server.begin_drain)


def test_images_in_the_engine_get_503_when_the_drain_ends(brief: Here, caplog: pytest.LogCaptureFixture) -> None:
    """On both paths: the fast one without an ASGI task, and the one through FastAPI."""
    go_on = keep_busy(brief.engine)
    with contextlib.ExitStack() as stack:
        lines = [stack.enter_context(contextlib.closing(brief.connect())) for _ in range(2)]
        lines[0].send(request(BODY))
        lines[1].send(request(BODY, Origin="x", Upgrade="x"))
        wait_until("both are in work", lambda: brief.engine._admission.in_flight == 2)
        drain(brief)
        for line in lines:
            status, headers, document = line.receive()
            assert (status, document["type"]) == (503, "urn:exitserve:problem:not-ready")
            assert headers["x-request-id"] == document["request_id"]
            assert line.ended()
        go_on.set()
        stats = brief.engine.stats()
        assert (stats.abandoned, stats.in_flight_rows) == (2, 0)
    assert brief.server.n_unanswered == 2
    assert not [record for record in caplog.records if record.exc_info]


def test_a_started_stream_ends_with_a_problem(
    brief: Here, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def follow(*_: Any) -> AsyncIterator[Step]:
        yield STEP
        await asyncio.sleep(3600)

    monkeypatch.setattr(Delivery, "follow", follow)
    with contextlib.closing(brief.connect()) as line:
        line.send(to("POST /classify/stream", "image/png", len(BODY)) + BODY)
        wait_until("it is in work", lambda: brief.app.lifecycle.requests_in_flight == 1)
        drain(brief)
        answer = b""
        while data := line.socket.recv(65536):
            answer += data
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n0\r\n\r\n"), "the client sees that nothing is missing"
    step, last = (json.loads(text) for text in answer.split(b"\r\n") if text.startswith(b"{"))
    assert (step["exit"], step["final"]) == (1, False)
    assert (last["type"], last["final"]) == ("urn:exitserve:problem:not-ready", True)
    assert not [record for record in caplog.records if record.exc_info]
