"""Connections: heads, bodies and clients that take too much memory or time, and data that is not HTTP."""

import asyncio
import contextlib
import gc
import json
import logging
import socket
import struct
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from service.api.connection import Connection
from service.logs import JsonFormatter
from service.server import listen
from tests.bundles import random_images
from tests.service.api.test_delivery import keep_busy
from tests.service.apps import png
from tests.service.sockets import Here, Line, head, request, serving
from tests.waiting import LIMIT_S, wait_until

BODY = png(random_images(1, seed=71)[0])
CHUNKED = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
CHUNK = b"%x\r\n%b\r\n" % (len(BODY), BODY)
QUIET_S = 1.0


@pytest.fixture
def hasty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """A server with very short timeouts."""
    with serving(folder, body_timeout_s=QUIET_S) as served:
        monkeypatch.setattr(served.server.config, "timeout_keep_alive", QUIET_S)
        yield served


def reset(line: Line) -> None:
    line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


def test_trailers_do_not_count_as_part_of_the_head(line: Line) -> None:
    line.send(CHUNKED + CHUNK + b"0\r\nX-Request-ID: of-a-trailer\r\nContent-Type: text/plain\r\n\r\n")
    status, headers, document = line.receive()
    assert status == 200
    assert headers["x-request-id"] == document["request_id"] != "of-a-trailer"


@pytest.mark.parametrize("begin", [b"", b"POST /classify HT", b"\r\n"])
def test_a_connection_without_a_complete_request_is_closed(hasty: Here, begin: bytes) -> None:
    with contextlib.closing(hasty.connect()) as line:
        line.send(begin)
        assert line.ended()
    with contextlib.closing(hasty.connect()) as line:  # after a request as well as before the first
        line.send(request(BODY))
        assert line.receive()[0] == 200
        line.send(begin)
        assert line.ended()


def test_the_time_to_begin_a_request_counts_from_the_latest_answer(here: Here, line: Line) -> None:
    """Whichever way it took, and also if its head was not parsed again."""

    def on_loop(read: Callable[[], float]) -> float:
        async def now() -> float:
            return read()

        return asyncio.run_coroutine_threadsafe(now(), here.loop).result(LIMIT_S)

    def quiet_since_s() -> float:
        [connection] = here.server.server_state.connections
        assert isinstance(connection, Connection)
        return connection.quiet_since_s

    for more in ({}, {}, {"Content_Type": "image/png; charset=binary"}, {}):
        go_on = keep_busy(here.engine)
        line.send(request(BODY, **more))
        wait_until("it is in work", lambda: here.app.lifecycle.requests_in_flight == 1)
        sleep(0.005)
        before_s = on_loop(here.loop.time)
        go_on.set()
        assert line.receive()[0] == 200
        assert on_loop(quiet_since_s) >= before_s


def test_a_slow_head_times_out(hasty: Here) -> None:
    with contextlib.closing(hasty.connect()) as line:
        line.send(b"GET / HTTP/1.1\r\n")
        line.socket.settimeout(0.05)

        def closed() -> bool:
            try:
                line.send(b"X: x\r\n")
                return line.socket.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        wait_until("it is closed", closed)


def test_an_unwanted_body_is_not_waited_for(hasty: Here) -> None:
    with contextlib.closing(hasty.connect()) as line:
        line.send(head(1_000_000_000))
        assert line.receive()[0] == 413
        line.send(b"x")
        assert line.ended()


def test_data_that_is_not_http_gets_a_problem_and_a_log_line(
    here: Here, line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    line.send(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03")  # a TLS ClientHello
    status, headers, document = line.receive()
    assert (status, document["type"]) == (400, "urn:exitserve:problem:broken-request")
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-request-id"] == document["request_id"]
    assert line.ended()
    wait_until("it is logged", lambda: any(record.name == "service.access" for record in caplog.records))
    [record] = [record for record in caplog.records if record.name == "service.access"]
    logged = json.loads(JsonFormatter().format(record))
    told = {"request_id": document["request_id"], "method": None, "status": 400, "problem": "broken-request"}
    assert told.items() <= logged.items()


def test_a_request_before_invalid_data_gets_its_own_answer(here: Here) -> None:
    for first in (request(BODY), request(BODY, Connection="keep-alive", Expect="nothing")):
        go_on = keep_busy(here.engine)
        with contextlib.closing(here.connect()) as line:
            line.send(first + b"\0\r\n\r\n")
            wait_until("the request is in work", lambda: here.app.lifecycle.requests_in_flight == 1)
            go_on.set()
            status, headers, _ = line.receive()
            assert (status, headers["connection"]) == (200, "close")
            assert line.ended()


def test_a_broken_body_is_refused_at_once(here: Here, line: Line) -> None:
    line.send(CHUNKED + b"what is this?\r\n")
    status, _, document = line.receive()
    assert (status, document["type"]) == (400, "urn:exitserve:problem:broken-request")
    assert line.ended()
    wait_until("it is given up", lambda: here.app.lifecycle.requests_in_flight == 0)


def test_requests_before_a_broken_body_get_their_own_answers(here: Here, caplog: pytest.LogCaptureFixture) -> None:
    """They were once dropped if the broken body had arrived while the first was in progress."""
    caplog.set_level(logging.INFO, "service.access")
    for first in (request(BODY), request(BODY, Expect="nothing")):
        go_on = keep_busy(here.engine)
        with contextlib.closing(here.connect()) as line:
            line.send(first + request(BODY) + CHUNKED + b"what is this?\r\n" + request(BODY))
            wait_until("the first is in work", lambda: here.app.lifecycle.requests_in_flight == 1)
            go_on.set()
            assert [line.receive()[0] for _ in range(2)] == [200, 200]
            status, headers, document = line.receive()
            assert (status, document["type"]) == (400, "urn:exitserve:problem:broken-request")
            assert headers["connection"] == "close"
            assert line.ended()
        wait_until("nothing of it is left", lambda: here.app.lifecycle.requests_in_flight == 0)
    lines = lambda: [record.getMessage() for record in caplog.records if record.name == "service.access"]  # noqa: E731
    # A client of an earlier test may leave only now.
    wait_until("all are logged", lambda: sum(not line.endswith(" 499") for line in lines()) == 6)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_refused_client_that_expects_100_continue_is_disconnected(here: Here, line: Line) -> None:
    line.send(head(len(BODY), Expect="100-continue"))
    assert line.socket.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    line.send(BODY)
    status, headers, _ = line.receive()
    assert status == 200
    assert "connection" not in headers
    for refused in (head(1_000_000_000, Expect="100-continue"), head(9, "?what=1", Expect="100-continue")):
        with contextlib.closing(here.connect()) as other:
            other.send(refused)
            status, headers, _ = other.receive()
            assert (status in (413, 422), headers["connection"]) == (True, "close")
            assert other.ended()


def test_a_client_that_does_not_read_times_out() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_a_connection_that_is_reset_is_forgotten(here: Here) -> None:
    line = here.connect()
    line.send(request(BODY))
    assert line.receive()[0] == 200
    port = line.socket.getsockname()[1]
    [known] = [weakref.ref(c) for c in here.server.server_state.connections if c.client and c.client[1] == port]
    reset(line)
    with contextlib.closing(here.connect()) as other:

        def forgotten() -> bool:
            other.send(request(BODY))  # the engine's thread keeps its latest, and so does each lane
            assert other.receive()[0] == 200
            gc.collect()  # there are reference cycles: connections and their requests refer to each other
            return known() is None

        wait_until("nothing holds it", forgotten)


def test_a_pipelining_client_that_leaves_abandons_its_requests(here: Here, caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn notifies only the last request: the one in progress went on and failed with a traceback when writing."""
    before = here.engine.stats().abandoned
    go_on = keep_busy(here.engine)
    try:
        line = here.connect()
        line.send(CHUNKED + CHUNK + b"0\r\n\r\n" + request(BODY))
        wait_until("the first is in work", lambda: here.app.lifecycle.requests_in_flight == 1)
        reset(line)
        wait_until("it is given up", lambda: here.app.lifecycle.requests_in_flight == 0)
    finally:
        go_on.set()
    assert here.engine.stats().abandoned == before + 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_endless_pipelined_requests_are_not_read_ahead(here: Here, line: Line) -> None:
    """uvicorn resumed reading with every answer: one connection took 50 MB/s, and the time of all others."""
    go_on = keep_busy(here.engine)
    try:
        line.send(CHUNKED + CHUNK + b"0\r\n\r\n")
        wait_until("the first is in work", lambda: here.app.lifecycle.requests_in_flight == 1)
        [connection] = [c for c in here.server.server_state.connections if not c.is_idle]
        names = [str(number) for number in range(600)]
        more = b"GET /healthz HTTP/1.1\r\nX-Request-ID: %b\r\nX-Filler: " + b"x" * 40 + b"\r\n\r\n"
        line.send(b"".join(more % name.encode() for name in names))
        line.send(b"GET /healthz HTTP/1.1\r\nX-Request-")  # and its end is read only after all are answered
        wait_until("enough have been read", lambda: len(connection.pipeline) >= 64)
        here.loop.call_soon_threadsafe(connection.flow.resume_reading)  # as when the first looks for its client's end
        wait_until("that changes nothing", lambda: connection.flow.read_paused)
        assert len(connection.pipeline) < 300
    finally:
        go_on.set()
    assert line.receive()[0] == 200
    assert [line.receive()[1]["x-request-id"] for _ in names] == names
    line.send(b"ID: last\r\n\r\n")
    assert line.receive()[1]["x-request-id"] == "last"


@pytest.mark.parametrize(
    ("begun", "path"),
    [
        (b"PUT /budget HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n", "/budget"),
        (b"POST /classify/stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n", "/classify/stream"),
    ],
    ids=["budget", "stream"],
)
def test_a_client_that_leaves_within_a_body_causes_no_error(
    here: Here, caplog: pytest.LogCaptureFixture, begun: bytes, path: str
) -> None:
    caplog.set_level(logging.INFO)
    line = here.connect()
    line.send(begun + b"Content-Length: 100\r\n\r\nx")
    wait_until("it is in work", lambda: here.app.lifecycle.requests_in_flight == 1)
    reset(line)
    wait_until("it is logged", lambda: any(record.name == "service.access" for record in caplog.records))
    [record] = [record for record in caplog.records if record.name == "service.access"]
    assert {"path": path, "status": 499}.items() <= json.loads(JsonFormatter().format(record)).items()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


UPGRADE = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"}


@pytest.mark.parametrize("n_bytes", [1, 300, 10_000])
def test_an_upgrade_header_is_ignored_and_the_body_is_read(line: Line, n_bytes: int) -> None:
    """Java's HttpClient sends it with its first request, whatever the body."""
    chunked = CHUNKED.replace(b"\r\n\r\n", b"\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n") + CHUNK + b"0\r\n\r\n"
    plain = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    data = request(BODY, **UPGRADE) + chunked + plain + request(BODY)
    for start in range(0, len(data), n_bytes):
        line.send(data[start : start + n_bytes])
    told = [line.receive() for _ in range(4)]
    assert [status for status, _, _ in told] == [200] * 4
    assert ["label" in document for _, _, document in told] == [True, True, False, True]


def test_http_1_0_requests_count_as_from_a_proxy(line: Line) -> None:
    put = b"PUT /budget HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
    put += b'{"fraction": 1}'
    line.send(put)
    assert line.receive()[0] == 200
    line.send(put.replace(b"HTTP/1.1", b"HTTP/1.0"))  # as nginx forwards it by default
    status, _, document = line.receive()
    assert (status, document["type"]) == (403, "urn:exitserve:problem:not-local")


def test_a_client_of_http_1_0_is_sent_no_chunks(line: Line) -> None:
    stream = request(BODY, "/stream").replace(b"HTTP/1.1", b"HTTP/1.0")
    line.send(stream)
    answer = b""
    while data := line.socket.recv(65536):
        answer += data
    head, _, lines = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nconnection: close" in head
    assert b"transfer-encoding" not in head
    assert b"content-length" not in head
    assert json.loads(lines.splitlines()[-1])["final"] is True


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_a_client_of_http_1_0_gets_a_content_length(line: Line, method: bytes) -> None:
    line.send(method + b" /web/style.css HTTP/1.0\r\nHost: localhost\r\n\r\n")
    answer = b""
    while data := line.socket.recv(65536):
        answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\ncontent-length: " + (b"%d\r\n" % len(body) if method == b"GET" else b"") in head
    assert bool(body) is (method == b"GET")


def test_the_idle_timeout_does_not_apply_to_the_first_request(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here.server.config, "timeout_keep_alive", 0.001)
    with contextlib.closing(here.connect()) as line:
        started = monotonic()
        wait_until("an idle one were closed", lambda: monotonic() > started + 0.5)
        line.send(request(BODY))
        assert line.receive()[0] == 200
        assert line.ended()
