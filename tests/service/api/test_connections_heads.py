"""Heads of requests that are too long or endless, however they are split into packets."""

import contextlib

import pytest

from tests.bundles import random_images
from tests.service.api.test_connections import CHUNK, CHUNKED
from tests.service.apps import png
from tests.service.sockets import Here, Line, request
from tests.waiting import wait_until

BODY = png(random_images(1, seed=71)[0])


def pour(line: Line, data: bytes, n_bytes: int) -> None:
    """Send `data` again and again, until the server closes the connection or has had `n_bytes`."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < n_bytes:
            line.send(data)
            sent += len(data)
    assert sent < n_bytes, "all of it was taken"


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /", b"x" * 10_000),
        (b"GET / HTTP/1.1\r\nX-Long: ", b"x" * 10_000),
        (b"GET / HTTP/1.1\r\n", b"X-Many: x\r\n" * 1000),
        (CHUNKED + b"1;", b"extension;" * 1000),
        (CHUNKED + CHUNK + b"0\r\n", b"X-Trailer: x\r\n" * 1000),
        (CHUNKED + CHUNK + b"0\r\nX-Trailer: ", b"x" * 10_000),
    ],
)
def test_endless_heads_are_refused(here: Here, line: Line, begin: bytes, more: bytes) -> None:
    line.send(begin)
    pour(line, more, 50_000_000)
    with contextlib.suppress(
        ConnectionError, IndexError
    ):  # closed with unread bytes, the connection may lose the answer
        status, _, document = line.receive()
        assert (status, document["type"]) == (431, "urn:exitserve:problem:head-too-large")
    with contextlib.closing(here.connect()) as other:
        other.send(request(BODY))
        assert other.receive()[0] == 200
    wait_until("nothing is in work", lambda: here.app.lifecycle.requests_in_flight == 0)


def test_a_head_that_is_too_long_gets_a_problem(line: Line) -> None:
    line.send(b"GET /" + b"x" * 70_000)
    status, headers, document = line.receive()
    assert (status, document["type"]) == (431, "urn:exitserve:problem:head-too-large")
    assert (headers["content-type"], headers["connection"]) == ("application/problem+json", "close")
    assert len(document["instance"]) <= 200
    assert line.ended()


LONG = b"X-Long: " + b"x" * 70_000 + b"\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"GET /healthz HTTP/1.1\r\n" + LONG + b"\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"X-Many: " + b"x" * 1000 + b"\r\n" + b"X-Many: x\r\n" * 7000 + b"\r\n",
        b"GET /healthz?" + b"x" * 60_000 + b" HTTP/1.1\r\nX-Long: " + b"x" * 10_000 + b"\r\n\r\n",
        request(BODY).replace(b"\r\n", b"\r\n" + LONG, 1),
        CHUNKED + CHUNK + b"0\r\n" + LONG + b"\r\n",
    ],
    ids=["field", "fields", "target", "picture", "trailer"],
)
@pytest.mark.parametrize("n_bytes", [1_000_000, 40_000, 4000])
def test_the_limit_does_not_depend_on_how_a_head_is_split(here: Here, line: Line, data: bytes, n_bytes: int) -> None:
    with contextlib.suppress(ConnectionError):  # nothing more is read after the refusal
        for start in range(0, len(data), n_bytes):
            line.send(data[start : start + n_bytes])
    if n_bytes > len(data):  # otherwise later bytes may make the answer get lost
        status, _, document = line.receive()
        assert (status, document["type"]) == (431, "urn:exitserve:problem:head-too-large")
        assert line.ended()
    else:
        with contextlib.suppress(ConnectionError):
            assert b" 200 OK" not in line.socket.recv(1000)
    wait_until("nothing is in work", lambda: here.app.lifecycle.requests_in_flight == 0)


def test_the_limit_applies_to_pipelined_heads(line: Line) -> None:
    line.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /healthz HTTP/1.1\r\n" + LONG + b"\r\n")
    status, headers, _ = line.receive()
    assert (status, headers["connection"]) == (200, "close")
    assert line.ended()


def test_a_long_head_with_a_large_body_is_accepted(line: Line) -> None:
    line.send(request(b"x" * 150_000, X_Long="x" * 60_000))
    status, _, document = line.receive()
    assert (status, document["type"]) == (400, "urn:exitserve:problem:not-an-image")
