"""A real server process: it survives whatever clients do, and loses no request when it is stopped."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import sleep

import httpx
import pytest

from tests.bundles import random_images, tiny_bundle
from tests.service.apps import PNG, png
from tests.service.process import PROGRAM, ServerProcess, running_server
from tests.waiting import LIMIT_S, wait_until

BODY = png(random_images(1, seed=41)[0])
HOURS_S = "3600"  # a limit that no test reaches


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


class SlowClient:
    """A request that the server has accepted, by asking for the body, of which only the first part has been sent."""

    def __init__(self, server: ServerProcess) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S)
        head = f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {len(BODY)}"
        self._socket.sendall(head.encode() + b"\r\nExpect: 100-continue\r\n\r\n")
        asked = b""
        while not asked.endswith(b"\r\n\r\n"):
            asked += self._socket.recv(1)
        assert asked.startswith(b"HTTP/1.1 100 "), asked
        self._socket.sendall(BODY[:100])

    def finish(self) -> None:
        self._socket.sendall(BODY[100:])

    def response(self) -> tuple[int, dict[str, object]]:
        with self._socket.makefile("rb") as file:
            status = int(file.readline().split()[1])
            length = 0
            while (line := file.readline().strip()) != b"":
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            return status, json.loads(file.read(length))

    def is_disconnected(self) -> bool:
        return self._socket.recv(1) == b""

    def close(self) -> None:
        self._socket.close()


@contextmanager
def slow_clients(server: ServerProcess, n_clients: int) -> Iterator[list[SlowClient]]:
    with ExitStack() as stack:
        clients = []
        for _ in range(n_clients):
            clients.append(SlowClient(server))
            stack.callback(clients[-1].close)
        yield clients


def wait_for(status: int, url: str) -> httpx.Response:
    wait_until(f"{url} says {status}", lambda: httpx.get(url).status_code == status)
    return httpx.get(url)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_accepted_requests_are_answered_before_it_stops(bundle_path: Path, log: Path, number: int) -> None:
    with running_server(bundle_path, log) as server, slow_clients(server, 50) as clients:
        server.process.send_signal(number)
        refused = wait_for(503, server.url + "/readyz")
        assert refused.headers["content-type"] == "application/problem+json"
        assert "stopping" in refused.json()["detail"]
        assert httpx.get(server.url + "/healthz").status_code == 200
        late = httpx.post(server.url + "/classify", content=BODY, headers=PNG)
        assert late.status_code == 503
        assert late.headers["connection"] == "close"
        assert server.process.poll() is None
        for client in clients:
            client.finish()
        for client in clients:
            status, answer = client.response()
            assert status == 200
            assert answer["label"]
        assert server.process.wait(LIMIT_S) == 0
    assert "answering 50 requests first" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("arguments", [(), ("--http-workers", "2")])
def test_sighup_stops_it_even_when_sent_twice(bundle_path: Path, log: Path, arguments: tuple[str, ...]) -> None:
    """A closing terminal and its shell may both send SIGHUP to all processes; it does not count as a second signal."""
    program = ("env", "--default-signal=HUP", *PROGRAM)  # even if the tests run with SIGHUP ignored
    with running_server(bundle_path, log, *arguments, program=program) as server, slow_clients(server, 8) as clients:
        processes = [server.process.pid, *children(server.process.pid)]
        for _ in range(2):
            for pid in processes:
                os.kill(pid, signal.SIGHUP)
            wait_for(503, server.url + "/readyz")
        for client in clients:
            client.finish()
        for client in clients:
            assert client.response()[0] == 200
        assert server.process.wait(LIMIT_S) == 0
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("arguments", [(), ("--http-workers", "2")])
def test_under_nohup_it_ignores_sighup(bundle_path: Path, log: Path, arguments: tuple[str, ...]) -> None:
    with running_server(bundle_path, log, *arguments, program=("nohup", *PROGRAM)) as server:
        processes = [server.process.pid, *children(server.process.pid)]
        for pid in processes:
            os.kill(pid, signal.SIGHUP)
        sleep(0.3)
        assert httpx.get(server.url + "/readyz").status_code == 200
        assert [server.process.pid, *children(server.process.pid)] == processes
        assert server.stop() == 0
    assert "Traceback" not in log.read_text()


def form() -> tuple[str, bytes]:
    """The image as an HTML form: content type and body."""
    request = httpx.Request("POST", "http://localhost", files={"image": ("a.png", BODY, "image/png")})
    return request.headers["content-type"], request.read()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("arguments", [(), ("--http-workers", "2")])
def test_requests_unread_in_its_sockets_at_the_signal_are_answered(
    bundle_path: Path, log: Path, arguments: tuple[str, ...]
) -> None:
    """Sent before the signal but not read yet, both on open connections and on ones that are not accepted yet."""
    heads = [("/classify", "image/png", BODY), ("/classify/stream", "image/png", BODY), ("/classify", *form())]
    requests = [
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n".encode()
        + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        for path, kind, body in heads
    ]
    with running_server(bundle_path, log, *arguments) as server, ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT_S))

        connections = [connect() for _ in range(20)]
        for connection in connections:  # until the server has accepted them
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            heard = b""
            while not heard.endswith(b'{"status":"alive"}'):
                heard += connection.recv(10_000)
        readers = children(server.process.pid) if arguments else [server.process.pid]
        for pid in readers:
            os.kill(pid, signal.SIGSTOP)
        connections += [connect() for _ in range(20)]
        for i, connection in enumerate(connections):
            connection.sendall(requests[i % len(requests)])
        server.process.send_signal(signal.SIGTERM)
        if arguments:  # workers are told by their parent
            wait_until("the parent has heard", lambda: "stopping:" in log.read_text())
        for pid in readers:
            os.kill(pid, signal.SIGCONT)
        told = []
        for connection in connections:
            with connection.makefile("rb") as file:
                answer = file.read()  # to the end: the server closes it after the answer
            assert answer.startswith(b"HTTP/1.1 200 "), answer[:200]
            assert b'"label"' in answer
            told.append(b"\r\nconnection: close\r\n" in answer.lower())
        # Without workers, requests read in the same turn of the event loop as the signal may be answered before it is
        # handled; connections that are accepted later cannot.
        assert all(told if arguments else told[20:])
        assert server.process.wait(LIMIT_S) == 0
    assert "Traceback" not in log.read_text()


def test_in_a_flood_every_request_gets_an_answer(bundle_path: Path, log: Path) -> None:
    async def flood(server: ServerProcess) -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=50)) as client:
            statuses: list[int] = []

            async def keep_asking() -> None:
                while True:
                    try:
                        response = await client.post("/classify", content=BODY, headers=PNG)
                    except httpx.TransportError:  # the server has stopped and did not receive the request
                        return
                    statuses.append(response.status_code)
                    if response.status_code != 200:
                        return

            asking = [asyncio.create_task(keep_asking()) for _ in range(50)]
            while statuses.count(200) < 100:
                await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.gather(*asking)
            return statuses

    with running_server(bundle_path, log) as server:
        statuses = asyncio.run(flood(server))
        assert set(statuses) <= {200, 503}
        assert statuses.count(503) <= 50
        assert server.process.wait(LIMIT_S) == 0
    # Every answer that it sent was received.
    assert f"stopped: {statuses.count(200)} answered, 0 abandoned, 0 failed" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_client_that_never_finishes_its_body_does_not_block_the_stop(bundle_path: Path, log: Path) -> None:
    arguments = ("--drain-s", "1", "--body-timeout-s", HOURS_S)
    with running_server(bundle_path, log, *arguments) as server, slow_clients(server, 1):
        assert server.stop() == 1
    assert "1 requests were not answered" in log.read_text()


def test_a_client_that_sends_too_slowly_gets_408(bundle_path: Path, log: Path) -> None:
    with running_server(bundle_path, log, "--body-timeout-s", "0.8") as server, slow_clients(server, 1) as [client]:
        status, document = client.response()
        assert status == 408
        assert document["type"] == "urn:exitserve:problem:body-too-slow"
        assert client.is_disconnected(), "what it still sends is no request"
        assert httpx.post(server.url + "/classify", content=BODY, headers=PNG).status_code == 200


def test_a_full_server_refuses_before_reading_the_body(bundle_path: Path, log: Path) -> None:
    with running_server(bundle_path, log, "--max-in-flight", "3") as server:
        with slow_clients(server, 3) as clients:
            refused = httpx.post(server.url + "/classify", content=BODY, headers=PNG)
            assert refused.status_code == 429
            assert refused.json()["type"] == "urn:exitserve:problem:overloaded"
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(server.url + "/budget").status_code == 200
            for client in clients:
                client.finish()
                assert client.response()[0] == 200
        assert httpx.post(server.url + "/classify", content=BODY, headers=PNG).status_code == 200
        assert 'requests_total{outcome="overloaded"} 1.0' in httpx.get(server.url + "/metrics").text
        assert server.stop() == 0


def test_a_second_signal_stops_it_at_once(bundle_path: Path, log: Path) -> None:
    arguments = ("--drain-s", HOURS_S, "--body-timeout-s", HOURS_S)
    with running_server(bundle_path, log, *arguments) as server, slow_clients(server, 3):
        server.process.send_signal(signal.SIGTERM)
        wait_for(503, server.url + "/readyz")
        assert server.stop() == 128 + signal.SIGTERM


def test_clients_that_hang_up_are_counted_as_abandoned(bundle_path: Path, log: Path) -> None:
    with running_server(bundle_path, log) as server:
        with slow_clients(server, 5):
            pass
        counted = 'requests_total{outcome="abandoned"} 5.0'
        wait_until("they are counted", lambda: counted in httpx.get(server.url + "/metrics").text)
        assert httpx.post(server.url + "/classify", content=BODY, headers=PNG).status_code == 200
        assert server.stop() == 0


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS greeting
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
        b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /%ff%00/../..?\xff HTTP/1.1\r\nHost: [::\r\n\r\n",
        b"PUT /budget HTTP/1.1\r\nHost: [::\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n" * 1000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    ],
)
def test_malformed_requests_do_not_stop_it(junk_server: ServerProcess, junk: bytes) -> None:
    with socket.create_connection(("127.0.0.1", junk_server.port), timeout=1) as connection:
        connection.sendall(junk)
        connection.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            answer = connection.recv(100)
            assert not answer.startswith(b"HTTP/1.1 5")
    assert httpx.post(junk_server.url + "/classify", content=BODY, headers=PNG).status_code == 200
    assert "Traceback" not in junk_server.log.read_text()


@pytest.fixture(scope="module")
def junk_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("junk")
    with running_server(tiny_bundle(folder / "bundle"), folder / "server.log") as server:
        yield server
