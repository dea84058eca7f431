"""The Python client under failures: bad arguments, gateways, broken connections, servers that start later."""

import asyncio
import http.server
import inspect
import json
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from math import inf, nan
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest

from service import command
from service.client import (
    AsyncClient,
    Client,
    DeadlinePassed,
    NotAllowed,
    NotReady,
    Overloaded,
    ServerError,
    Unreachable,
    refusal,
)
from service.client.patience import FIRST_S, MOST_S, Patience
from tests.waiting import LIMIT_S

Answer = tuple[int, dict[str, str], bytes]
READY: Answer = (200, {}, b'{"status":"ready"}')
STEP = {
    "exit": 1, "exits": 2, "label": "fox", "class_id": 1, "confidence": 0.5, "top_k": [], "score": None,
    "threshold": None, "mflops": 1.0, "final": False,
}  # fmt: skip
LAST = {
    **STEP, "reason": "confident", "full_mflops": 2.0, "model": "m", "version": "v", "request_id": "r", "final": True,
    "timings": {"decode_ms": 1, "queue_ms": 1, "stages_ms": 1, "total_ms": 3},
}  # fmt: skip
ANSWER: Answer = (200, {}, json.dumps(LAST).encode())


class Scripted:
    """A server that gives scripted answers in order and records the requests; None hangs up."""

    def __init__(self) -> None:
        self.script: list[Answer | None] = []
        self.asked: list[tuple[str, str | None, bytes]] = []  # path, token, body
        scripted = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"] or 0))
                scripted.asked.append((self.path, self.headers["authorization"], body))
                answer = scripted.script.pop(0) if len(scripted.script) > 1 else scripted.script[0]
                if answer is not None:
                    self.send_response(answer[0])
                    for header in answer[1].items():
                        self.send_header(*header)
                    self.end_headers()
                    self.wfile.write(answer[2])

            def do_POST(self) -> None:
                self.do_GET()

            do_PUT = do_POST  # noqa: N815

            def log_message(self, *args: object) -> None: ...

        # Bound but not listening: connections are refused.
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server.server_bind()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def listen(self) -> None:
        self.server.server_activate()
        self._thread.start()

    def close(self) -> None:
        if self._thread.ident is not None:
            self.server.shutdown()
            self._thread.join()
        self.server.server_close()


@pytest.fixture
def idle() -> Iterator[Scripted]:
    scripted = Scripted()
    yield scripted
    scripted.close()


@pytest.fixture
def scripted(idle: Scripted) -> Scripted:
    idle.listen()
    return idle


def waiting(url: str, call: Callable[[Any], Any], **options: Any) -> Any:
    with Client(url, **options) as client:
        made = call(client)
        return list(made) if inspect.isgenerator(made) else made


def awaited(url: str, call: Callable[[Any], Any], **options: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, **options) as client:
            made = call(client)
            return [line async for line in made] if inspect.isasyncgen(made) else await made

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [waiting, awaited])


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_an_invalid_url_is_refused_at_once(client: type[Client]) -> None:
    for no_url in (
        *("127.0.0.1:8000", "localhost:8000", "", "ftp://host", "http://"),
        *("http://127.0.0.1:abc", "http://[::1", "http://a..b", "http://xn--/", "http://\0"),
    ):
        with pytest.raises(Unreachable, match=r"is no URL of a server .* looks like http://127\.0\.0\.1:8000"):
            client(no_url)
    with pytest.raises(ValueError, match="retries is -1 but must be 0 or more"):
        client(retries=-1)


@both
def test_a_token_is_stripped_and_never_shown(scripted: Scripted, ask: Callable[..., Any]) -> None:
    scripted.script = [READY]
    ask(scripted.url, lambda client: client.wait_ready(), token=" secret horse\n")
    assert scripted.asked[0][1] == "Bearer secret horse"
    for token in ("horse\nhorse", "hörse", "horse\0"):
        with pytest.raises(ValueError, match="token has characters that are not printable ASCII") as caught:
            ask(scripted.url, lambda client: client.wait_ready(), token=token)
        assert "rse" not in str(caught.value)
    with pytest.raises(Unreachable) as unreachable:
        ask("http://me:horse@127.0.0.1:1", lambda client: client.budget())
    assert "horse" not in str(unreachable.value)


@both
def test_numbers_of_every_type_are_sent_and_none_values_omitted(scripted: Scripted, ask: Callable[..., Any]) -> None:
    scripted.script = [ANSWER]
    ask(scripted.url, lambda client: client.classify(b"x", top_k=None, exit=np.int64(2)))
    ask(scripted.url, lambda client: client.classify(b"x", top_k=None))
    assert [path for path, _, _ in scripted.asked] == ["/classify?exit=2", "/classify"]
    with pytest.raises(ServerError, match="is no BudgetState"):
        ask(scripted.url, lambda client: client.set_budget("fraction", np.float32(0.5), latency_ms=np.int64(50)))
    assert json.loads(scripted.asked[-1][2]) == {"fraction": 0.5, "latency_ms": 50}
    for value in (nan, inf, np.float32(nan)):
        with pytest.raises(ValueError, match=r"fraction is (nan|inf) but must be a finite number"):
            ask(scripted.url, lambda client, value=value: client.set_budget("fraction", value))
    with pytest.raises(ValueError, match="latency_ms is nan"):
        ask(scripted.url, lambda client: client.set_budget("fraction", 0.5, nan))
    n_asked = len(scripted.asked)
    for nothing in ((), ("fraction",), (None, 0.5), ("fraction", None, 50)):
        with pytest.raises(ValueError, match="give a kind of budget and its value"):
            ask(scripted.url, lambda client, nothing=nothing: client.set_budget(*nothing))
    assert len(scripted.asked) == n_asked


# --- answers ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("status", "kind"), [(429, Overloaded), (502, NotReady), (503, NotReady), (504, NotReady)])
def test_a_gateways_errors_are_temporary(
    scripted: Scripted, ask: Callable[..., Any], status: int, kind: type[ServerError]
) -> None:
    scripted.script = [(status, {"Retry-After": "7"}, b"<html>Bad Gateway</html>")]
    for call in (lambda client: client.budget(), lambda client: client.stream(b"x")):
        with pytest.raises(kind, match=f"answers {status} without a problem document, as a gateway does") as caught:
            ask(scripted.url, call)
        assert (caught.value.status, caught.value.kind, caught.value.retry_after_s) == (status, "gateway", 7.0)


def test_a_gateways_retry_after_may_be_a_date_or_invalid(scripted: Scripted) -> None:
    def retry_after_s(header: str) -> float | None:
        scripted.script = [(503, {"Retry-After": header}, b"")]
        with pytest.raises(NotReady) as caught:
            waiting(scripted.url, lambda client: client.budget())
        return caught.value.retry_after_s

    soon = retry_after_s(format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True))
    assert soon is not None
    assert 3600 - LIMIT_S < soon <= 3600
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert [retry_after_s(header) for header in ("soon", "-1", "")] == [None] * 3


@both
def test_a_stream_that_ends_before_its_answer_is_a_lost_connection(scripted: Scripted, ask: Callable[..., Any]) -> None:
    step, last = (json.dumps(line).encode() + b"\n" for line in (STEP, LAST))
    scripted.script = [(200, {}, step + last)]
    assert [line.final for line in ask(scripted.url, lambda client: client.stream(b"x"))] == [False, True]
    for cut in (b"", step, step + step, step + last[:20]):
        scripted.script = [(200, {}, cut)]
        with pytest.raises(Unreachable, match="ended the stream before the answer"):
            ask(scripted.url, lambda client: client.stream(b"x"))


@both
def test_a_label_may_contain_unicode_line_separators(scripted: Scripted, ask: Callable[..., Any]) -> None:
    label = "sea\u2028lion\u0085"
    scripted.script = [(200, {}, json.dumps(LAST | {"label": label}, ensure_ascii=False).encode() + b"\n")]
    assert [line.label for line in ask(scripted.url, lambda client: client.stream(b"x"))] == [label]


@both
def test_an_answer_that_cannot_be_decoded_is_of_another_server(scripted: Scripted, ask: Callable[..., Any]) -> None:
    scripted.script = [(200, {"Content-Encoding": "gzip"}, b"no gzip")]
    for call in (lambda client: client.budget(), lambda client: client.stream(b"x")):
        with pytest.raises(ServerError, match="its answer cannot be unpacked"):
            ask(scripted.url, call)


def test_more_calls_than_connections_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait in the client and not in httpx, where most of a thousand would time out."""
    monkeypatch.setattr("service.client.awaited.MOST_AT_ONCE", 2)
    n_asked = 0

    async def ask() -> list[float]:
        go_on = asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal n_asked
            await reader.readuntil(b"\r\n\r\n")
            n_asked += 1
            await go_on.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + ANSWER[2])
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with AsyncClient(f"http://127.0.0.1:{port}") as client:
                calls = [asyncio.create_task(client.classify(b"x")) for _ in range(5)]
                while n_asked < 2:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.05)  # calls that do not wait are made meanwhile
                assert n_asked == 2
                go_on.set()
                return [answer.confidence for answer in await asyncio.gather(*calls)]

    assert asyncio.run(ask()) == [LAST["confidence"]] * 5
    assert n_asked == 5


# --- retries ------------------------------------------------------------------------------------------------------


def problem(status: int, **more: Any) -> Answer:
    document = {"type": "urn:exitserve:problem:some", "status": status, "detail": "why", **more}
    return status, {"Content-Type": "application/problem+json"}, json.dumps(document).encode()


@both
def test_a_call_is_retried_as_often_as_allowed(scripted: Scripted, ask: Callable[..., Any]) -> None:
    def classify(client: Any) -> Any:
        return client.classify(b"x")

    busy = problem(429, retry_after_s=0.001)
    scripted.script = [busy, (502, {"Retry-After": "0"}, b""), ANSWER]
    assert ask(scripted.url, classify, retries=2).label == "fox"
    assert [body for _, _, body in scripted.asked] == [b"x"] * 3
    scripted.script = [busy]
    with pytest.raises(Overloaded):
        ask(scripted.url, classify, retries=2)
    assert len(scripted.asked) == 6
    with pytest.raises(Overloaded):
        ask(scripted.url, classify)
    assert len(scripted.asked) == 7
    scripted.script = [None, None, ANSWER]  # the second connection is the one that is always tried
    assert ask(scripted.url, classify, retries=1).label == "fox"
    scripted.script = [busy, ANSWER]
    assert len(ask(scripted.url, lambda client: client.stream(b"x"), retries=1)) == 1


def test_the_command_retries_after_the_servers_delay(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (picture := tmp_path / "a.png").write_bytes(b"x")
    arguments = ["--url", scripted.url, "--json", str(picture), str(picture)]
    scripted.script = [problem(429, retry_after_s=0.001), ANSWER]
    assert command.main(arguments) == 0
    assert [json.loads(line)["answer"]["label"] for line in capsys.readouterr().out.splitlines()] == ["fox", "fox"]
    assert len(scripted.asked) == 3
    monkeypatch.setattr("service.client.DEFAULT_TIMEOUT_S", 0.1)
    scripted.script = [problem(503, retry_after_s=0.06)]
    assert command.main(arguments) == 1
    assert [json.loads(line)["error"] for line in capsys.readouterr().out.splitlines()] == ["why", "why"]
    assert len(scripted.asked) <= 3 + 2 + 1, "images waited for a server that another had waited for in vain"


@both
def test_a_call_is_not_retried_in_vain_or_too_late(scripted: Scripted, ask: Callable[..., Any]) -> None:
    for n_asked, (answer, kind) in enumerate(
        ((problem(401), NotAllowed), (problem(504), DeadlinePassed), (problem(503, retry_after_s=3600), NotReady)), 1
    ):
        scripted.script = [answer]
        with pytest.raises(kind):
            ask(scripted.url, lambda client: client.budget(), retries=9)
        assert len(scripted.asked) == n_asked


def test_retry_delays_grow_up_to_a_limit() -> None:
    error = Unreachable("nobody")
    patience = Patience(2000, None)
    waits = [patience.wait_s(error) for _ in range(2000)]
    assert FIRST_S / 2 <= waits[0] <= FIRST_S
    assert all(MOST_S / 2 <= wait_s <= MOST_S for wait_s in waits[5:])
    assert len(set(waits[5:])) > 1  # not all clients at once
    with pytest.raises(Unreachable):
        patience.wait_s(error)
    with pytest.raises(Unreachable):
        Patience(9, FIRST_S / 4).wait_s(error)
    later = refusal({"type": "overloaded", "status": 429, "detail": "", "retry_after_s": 3.25})
    assert Patience(9, 60.0).wait_s(later) == 3.25


# --- waiting for a server -----------------------------------------------------------------------------------------


@both
def test_it_waits_for_a_server_to_start(idle: Scripted, ask: Callable[..., Any]) -> None:
    idle.script = [problem(503, retry_after_s=0.001), (502, {}, b""), READY]
    timer = threading.Timer(0.3, idle.listen)
    timer.start()
    try:
        ask(idle.url, lambda client: client.wait_ready(LIMIT_S))
    finally:
        timer.join()
    assert [path for path, _, _ in idle.asked] == ["/readyz"] * 3


@both
def test_it_waits_only_for_a_limited_time(scripted: Scripted, ask: Callable[..., Any]) -> None:
    scripted.script = [problem(503)]
    with pytest.raises(NotReady, match="why"):
        ask(scripted.url, lambda client: client.wait_ready(0.5))
    assert len(scripted.asked) > 1
    with pytest.raises(Unreachable, match="cannot be reached"):
        ask("http://127.0.0.1:1", lambda client: client.wait_ready(0.1))
    scripted.script = [(200, {}, b"<html>")]
    with pytest.raises(ServerError, match="is no Readiness"):
        ask(scripted.url, lambda client: client.wait_ready(LIMIT_S))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections but never answers
        started_s = monotonic()
        with pytest.raises(Unreachable, match="took too long"):
            ask(f"http://127.0.0.1:{silent.getsockname()[1]}", lambda client: client.wait_ready(0.2), timeout_s=1e6)
        assert monotonic() - started_s < LIMIT_S
