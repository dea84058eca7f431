"""The fast path, over real sockets: its answers are the same as the application's."""

import contextlib
import json
import logging
import threading
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import httpx
import numpy as np
import pytest

from service.api.connection import Connection
from service.api.direct import Desk
from service.api.lifecycle import Phase
from service.api.protocol import Cycle
from service.engine.rows import Options
from service.logs import JsonFormatter
from tests.bundles import random_images
from tests.service import sockets
from tests.service.api.test_delivery import keep_busy
from tests.service.apps import PNG, encoded, png
from tests.service.sockets import Here, Line, head, serving
from tests.waiting import LIMIT_S, wait_until

IMAGES = random_images(16, seed=71)
BODY = png(IMAGES[0])
LARGE = encoded(np.tile(IMAGES[0], (12, 12, 1)), "PNG")  # too large to be decoded on the event loop
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def request(body: bytes = BODY, query: str = "", **more: str) -> bytes:
    return sockets.request(body, query, **more)


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all bodies that take the fast path."""
    lengths: list[int] = []
    take = Desk.take

    def seen(desk: Desk, visit: Any, body: bytes) -> None:
        lengths.append(len(body))
        take(desk, visit, body)

    monkeypatch.setattr(Desk, "take", seen)
    return lengths


def without_times(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in ("timings", "request_id")}


@pytest.mark.parametrize(
    ("body", "query", "status"),
    [
        (BODY, "", 200),
        (BODY, "?exit=2&top_k=3", 200),
        (BODY, "?deadline_ms=60000", 200),
        (encoded(IMAGES[1], "JPEG"), "", 200),
        (LARGE, "", 200),
        (b"", "", 400),
        (b"no image", "", 400),
        (BODY[:-40], "", 400),
        (LARGE[:-4000], "", 400),
        (BODY, "?topk=1", 422),
        (BODY, "?exit=9", 422),
    ],
)
def test_the_answer_equals_the_applications_and_counts_as_much(
    here: Here, visits: list[int], body: bytes, query: str, status: int
) -> None:
    names = ("decode_seconds_count", 'requests_total{outcome="answered"}', 'requests_total{outcome="invalid"}')
    before = [here.metric(f"exitserve_{name}") for name in names]
    with contextlib.closing(here.connect()) as line:
        line.send(request(body, query, traceparent=TRACEPARENT))
        direct = line.receive()
    assert len(visits) == (status != 422)  # a bad query is refused after the head
    application = httpx.post(
        here.url + "/classify" + query,
        content=(part for part in (body,)),  # of a length not announced: the application reads it
        headers={**PNG, "traceparent": TRACEPARENT},
    )
    assert len(visits) == (status != 422)
    assert without_times(direct[2]) == without_times(application.json())
    assert direct[0] == application.status_code == status
    assert direct[1].keys() == dict(application.headers).keys()
    assert direct[1]["content-type"] == application.headers["content-type"]
    assert direct[1]["traceparent"] == TRACEPARENT
    assert direct[1]["x-request-id"] == direct[2].get("request_id", direct[1]["x-request-id"])
    counted = [here.metric(f"exitserve_{name}") - count for name, count in zip(names, before, strict=True)]
    assert counted == ([2, 2, 0] if status == 200 else [0, 0, 2])  # one each


def test_bodies_in_pieces_and_unusual_requests_go_to_the_application(here: Here, line: Line, visits: list[int]) -> None:
    data = request()
    line.send(data[:-100])
    wait_until("the application has the request", lambda: here.app.lifecycle.requests_in_flight == 1)
    line.send(data[-100:])
    assert line.receive()[0] == 200
    for more in ({"Connection": "close"}, {"Content_Type": "image/png; charset=binary"}):
        with contextlib.closing(here.connect()) as other:
            other.send(request(**more))
            assert other.receive()[0] == 200
    assert not visits
    line.send(request())
    assert line.receive()[0] == 200
    assert len(visits) == 1


def test_pipelined_requests_are_answered_in_order(here: Here, line: Line) -> None:
    go_on = keep_busy(here.engine)
    wanted = [request(query=f"?top_k={k}") for k in (1, 2, 3)] + [request(b"none"), request(query="?top_k=4")]
    line.send(b"".join(wanted))
    go_on.set()
    told = [line.receive() for _ in wanted]
    assert [len(document.get("top_k", ())) for _, _, document in told] == [1, 2, 3, 0, 4]
    assert len({headers["x-request-id"] for _, headers, _ in told}) == len(wanted)


def test_many_connections_each_get_their_own_answer(here: Here, visits: list[int]) -> None:
    alone = [here.engine.submit(image, Options(exit=1)).result(LIMIT_S).confidence for image in IMAGES]
    lines = [here.connect() for _ in IMAGES]
    for _ in range(20):
        for line, image in zip(lines, IMAGES, strict=True):
            line.send(request(png(image), "?exit=1"))
        assert [line.receive()[2]["confidence"] for line in lines] == [round(sure, 6) for sure in alone]
    assert len(visits) == 20 * len(IMAGES)
    for line in lines:
        line.close()


def test_a_repeated_head_is_not_parsed_again(
    here: Here, line: Line, visits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[bytes] = []
    parse = Connection.data_received

    def seen(protocol: Connection, data: bytes) -> None:
        parsed.append(data)
        parse(protocol, data)

    monkeypatch.setattr(Connection, "data_received", seen)
    # Data after the end of an image is ignored.
    bodies = [png(image).ljust(n_bytes, b"\0") for image, n_bytes in zip(IMAGES, [*range(9_993, 10_009)], strict=True)]
    alone = [here.engine.submit(image, Options(exit=1)).result(LIMIT_S).confidence for image in IMAGES]
    for body, sure in zip(bodies, alone, strict=True):
        line.send(request(body, "?exit=1"))
        status, headers, document = line.receive()
        assert (status, document["confidence"], document["exit"]) == (200, round(sure, 6), 1)
        assert headers["x-request-id"] == document["request_id"]
    assert len(parsed) == 1
    for n_parsed, query in ((2, "?exit=2"), (2, "?exit=2"), (3, "?exit=1"), (4, "?exit=9"), (5, "?exit=9")):
        line.send(request(bodies[0], query))
        status, _, document = line.receive()
        assert (status, document.get("exit")) == ((200, int(query[-1])) if query != "?exit=9" else (422, None))
        assert len(parsed) == n_parsed  # refused heads must not be cached
    data = request(bodies[0], "?exit=1")
    assert visits == [*map(len, bodies), *[9_993] * 3]
    for pieces in ([data[:-100], data[-100:]], [data[:40], data[40:]]):
        line.send(data)
        assert line.receive()[0] == 200
        line.send(pieces[0])
        wait_until("it has come", lambda part=pieces[0]: parsed[-1] == part)  # type: ignore[misc]
        line.send(pieces[1])
        assert line.receive()[0] == 200
    line.send(data + data)
    assert [line.receive()[0] for _ in range(2)] == [200, 200]
    line.send(data)
    assert line.receive()[0] == 200
    # A wrong length is handled by the parser: if too short, the rest is no valid request; if too long, more must come.
    for length in ("9992", "+9993", "99930", "09993x"):
        n_parsed = len(parsed)
        with contextlib.closing(here.connect()) as other:
            other.send(data)
            assert other.receive()[0] == 200
            other.send(data.replace(b": 9993\r", f": {length}\r".encode()))
            wait_until("it is parsed", lambda both=n_parsed + 2: len(parsed) >= both)  # type: ignore[misc]


def test_a_repeated_head_does_not_lift_the_limit_of_bodies(folder: Path) -> None:
    with serving(folder, max_body_bytes=20_000) as here, contextlib.closing(here.connect()) as line:
        for n_bytes, status in ((10_000, 200), (20_000, 200), (20_001, 413)):
            line.send(request(BODY.ljust(n_bytes, b"\0")))
            assert line.receive()[0] == status


def test_a_quiet_connection_is_closed_and_a_busy_one_is_not(
    here: Here, monkeypatch: pytest.MonkeyPatch, visits: list[int]
) -> None:
    monkeypatch.setattr(here.server.config, "timeout_keep_alive", 1.0)
    line = here.connect()
    until_s = monotonic() + 1.5
    while monotonic() < until_s:
        line.send(request())
        assert line.receive()[0] == 200
    go_on = keep_busy(here.engine)
    line.send(request())
    wait_until("its time is over", lambda: here.app.lifecycle.requests_in_flight == 1 and monotonic() > until_s + 1.2)
    go_on.set()
    assert line.receive()[0] == 200
    assert len(visits) > 2
    assert line.ended()
    line.close()


def test_a_client_that_leaves_abandons_its_image_at_once(here: Here) -> None:
    before = here.engine.stats().abandoned
    gone = 'exitserve_requests_total{outcome="abandoned"}'
    counted = here.metric(gone)
    go_on = keep_busy(here.engine)
    line = here.connect()
    line.send(request())
    wait_until("the request is in work", lambda: here.app.lifecycle.requests_in_flight == 1)
    line.close()
    wait_until("it is given up", lambda: here.app.lifecycle.requests_in_flight == 0)
    go_on.set()
    assert here.engine.stats().abandoned == before + 1
    assert here.metric(gone) == counted + 1


def test_a_picture_whose_client_has_left_is_not_decoded(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, stop = here.app.desk.state.decoder._elsewhere, threading.Event()
    decode = threads._decode
    monkeypatch.setattr(threads, "_decode", lambda body: decode(body) if stop.wait(LIMIT_S) else None)
    others = [threads.submit(LARGE) for _ in range(threads._n_threads)]
    with contextlib.closing(here.connect()) as line:
        line.send(request(LARGE))
        wait_until("it waits for a thread", lambda: threads._n_submitted == len(others) + 1)
    wait_until("it is given up", lambda: threads._n_submitted == len(others))
    stop.set()
    for other in others:
        other.result(LIMIT_S)


def test_a_picture_that_would_wait_too_long_for_a_thread_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, max_queue_s=1e-9) as here, contextlib.closing(here.connect()) as line:
        threads, stop = here.app.desk.state.decoder._elsewhere, threading.Event()
        decode = threads._decode
        monkeypatch.setattr(threads, "_decode", lambda body: decode(body) if stop.wait(LIMIT_S) else None)
        others = [threads.submit(LARGE) for _ in range(threads._n_threads)]
        line.send(request(LARGE))
        status, headers, document = line.receive()
        assert (status, document["type"]) == (429, "urn:exitserve:problem:overloaded")
        assert headers["retry-after"] == "1"
        stop.set()
        for other in others:
            other.result(LIMIT_S)
        wait_until("the threads are idle", lambda: threads._n_submitted == 0)
        line.send(request(LARGE))
        assert line.receive()[0] == 200


def test_an_open_connection_keeps_no_image_in_memory(here: Here, line: Line) -> None:
    body = BODY + bytes(50_000)  # data after the end of an image is ignored
    cycles: list[Any] = []
    for _ in range(100):  # on a busy machine, a body may be read in two parts and take the other path
        line.send(request(body))
        assert line.receive()[0] == 200
        cycles = [connection.cycle for connection in here.server.server_state.connections]
        if all(isinstance(cycle, Cycle) for cycle in cycles):
            break
    assert [cycle.body for cycle in cycles] == [[]]
    assert not here.app.desk._bodies


def test_without_room_it_refuses_after_the_head_and_keeps_the_connection(
    here: Here, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission = here.engine._admission
    monkeypatch.setattr(admission, "room_rows", 0)
    line.send(head(len(BODY)))
    status, headers, document = line.receive()
    assert (status, document["type"]) == (429, "urn:exitserve:problem:overloaded")
    assert headers["retry-after"] == "1"
    line.send(BODY)
    line.send(request())
    assert line.receive()[0] == 429
    monkeypatch.undo()
    line.send(request())
    assert line.receive()[0] == 200
    assert here.app.lifecycle.requests_in_flight == 0


def test_a_bug_is_a_problem_and_the_next_request_an_answer(
    here: Here, line: Line, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr("service.api.documents.Documents.answer", broken)
    line.send(request())
    status, _, document = line.receive()
    assert (status, document["type"]) == (500, "urn:exitserve:problem:internal-error")
    assert "secret" not in json.dumps(document)
    assert "a secret of the inside" in caplog.text
    monkeypatch.undo()
    line.send(request())
    assert line.receive()[0] == 200
    assert here.app.lifecycle.requests_in_flight == 0


def test_a_request_whose_error_cannot_be_sent_does_not_block_the_next(
    here: Here, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise OSError("its connection is in no state to be written to")

    with contextlib.closing(here.connect()) as other:
        for each in (line, other):  # so that both have been accepted
            each.send(request())
            assert each.receive()[0] == 200
        n_submitted = here.engine.stats().submitted
        monkeypatch.setattr(Desk, "_end", broken)
        go_on = threading.Event()
        here.loop.call_soon_threadsafe(go_on.wait, LIMIT_S)  # both come in one turn of the event loop
        line.send(request(b"no image"))
        other.send(request())
        go_on.set()
        wait_until("the one behind it is submitted", lambda: here.engine.stats().submitted > n_submitted)


def test_every_request_is_logged(here: Here, line: Line, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "service.access")
    began_s = perf_counter()
    line.send(request(query="?exit=2", traceparent=TRACEPARENT, X_Request_ID="mine-1"))
    assert line.receive()[1]["x-request-id"] == "mine-1"
    line.send(request(b"none", X_Request_ID="mine-2"))
    line.receive()
    line.send(request(query="?exit=9", X_Request_ID="mine-3"))  # refused before its body
    line.receive()

    def logged() -> list[dict[str, Any]]:
        """Log lines of these three, since a client of an earlier test may leave only now."""
        lines = (JsonFormatter().format(record) for record in caplog.records if record.name == "service.access")
        return [line for line in map(json.loads, lines) if line["request_id"].startswith("mine-")]

    wait_until("all are logged", lambda: len(logged()) == 3)
    first, second, third = logged()
    assert {
        "request_id": "mine-1",
        "traceparent": TRACEPARENT,
        "client": "127.0.0.1",
        "path": "/classify",
        "status": 200,
        "exit": 2,
    }.items() <= first.items()
    assert first["response_bytes"] > 100
    assert {"status": 400, "problem": "not-an-image"}.items() <= second.items()
    assert {"status": 422, "problem": "bad-parameter"}.items() <= third.items()
    assert 0 < sum(line["duration_ms"] for line in logged()) < 1e3 * (perf_counter() - began_s)


def test_requests_in_progress_at_the_stop_are_answered_and_connections_closed(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    with serving(folder) as here:
        line, late = here.connect(), here.connect()
        go_on = keep_busy(here.engine)
        line.send(request())
        wait_until("the request is in work", lambda: here.app.lifecycle.requests_in_flight == 1)
        late.send(request(b"none"))
        assert late.receive()[0] == 400
        here.loop.call_soon_threadsafe(here.server.begin_drain)
        wait_until("it is draining", lambda: here.app.lifecycle.phase is Phase.DRAINING)
        late.send(request())
        assert late.receive()[0] == 503
        wait_until("it is logged", lambda: any("503" in record.getMessage() for record in caplog.records))
        [refused] = [json.loads(JsonFormatter().format(r)) for r in caplog.records if "503" in r.getMessage()]
        assert refused["problem"] == "not-ready"
        go_on.set()
        status, headers, _ = line.receive()
        assert (status, headers["connection"]) == (200, "close")
        assert line.ended()
        line.close()
        late.close()
