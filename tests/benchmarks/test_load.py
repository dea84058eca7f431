"""The load generator sends on schedule, charges a server for its stalls, and counts failures."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks.load.__main__ import main
from benchmarks.load.arrivals import bursts, poisson
from benchmarks.load.connection import http_request
from benchmarks.load.loops import closed_loop, open_loop

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
Handler = Callable[[int], Awaitable[bytes | None]]  # maps the number of a request to an answer; None: hang up


@contextmanager
def http_server(handler: Handler) -> Iterator[str]:
    """A small server in its own thread; yields the URL to POST to."""
    ready, running = threading.Event(), []
    counted = iter(range(1_000_000))

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
                await reader.readexactly(length)
                answer = await handler(next(counted))
                if answer is not None:
                    writer.write(answer)
                if answer is None or (b"content-length" not in answer and b"chunked" not in answer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def serve() -> None:
        stop = asyncio.Event()
        server = await asyncio.start_server(converse, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/classify"
        running.append((address, asyncio.get_running_loop(), stop))
        ready.set()
        await stop.wait()
        server.close()
        conversations = asyncio.all_tasks() - {asyncio.current_task()}
        for task in conversations:
            task.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)
        await asyncio.sleep(0.01)  # aborted transports close in the next iteration

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    url, loop, stop = running[0]
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def answer_at_once(number: int) -> bytes:
    return OK


def requests(url: str, n_images: int = 3) -> list[bytes]:
    return [http_request(url, f"image {i}".encode(), "image/png") for i in range(n_images)]


@pytest.mark.parametrize("max_connections", [1000, 1])
def test_a_stall_counts_for_all_requests_due_meanwhile(max_connections: int) -> None:
    """The server stalls for half a second at the 20th request; the clients must not wait for it."""
    stalled: list[asyncio.Future[None]] = []
    stall_s = 0.5

    async def stall_once(number: int) -> bytes:
        if number == 20:
            stalled.append(asyncio.ensure_future(asyncio.sleep(stall_s)))
        if number >= 20:
            await stalled[0]
        return OK

    arrivals = np.arange(200) / 200.0  # 5 ms apart, so that the stall begins at 0.1 s
    with http_server(stall_once) as url:
        result = asyncio.run(open_loop(url, requests(url), arrivals, max_connections=max_connections))
    assert result.n_sent == 200
    assert result.failures == {}
    during = (result.intended_s >= 0.1) & (result.intended_s < 0.1 + stall_s)
    waited_ms = 1e3 * (0.1 + stall_s - result.intended_s[during])
    # A client that sends only after each answer would see one slow answer instead of these 100.
    assert during.sum() == 100
    assert (result.latency_ms[during] >= waited_ms - 1).all()
    assert result.percentile_ms(75) > 100


def test_requests_have_the_given_rate_and_cycle_through_the_images() -> None:
    arrivals = poisson(300, 1.0, seed=1)
    assert abs(len(arrivals) - 300) < 5 * 300**0.5
    assert (np.diff(arrivals) >= 0).all()
    with http_server(answer_at_once) as url:
        result = asyncio.run(open_loop(url, requests(url), arrivals))
    assert result.n_sent == len(arrivals) == result.answered.sum()
    assert (result.sent_s >= result.intended_s).all()
    assert result.achieved_rate == pytest.approx(len(arrivals) / result.seconds)
    assert result.image_index.tolist()[:4] == [0, 1, 2, 0]
    assert 0 < result.client_cpu_s < result.seconds


def test_bursts_have_the_same_average_rate() -> None:
    arrivals = bursts(1000, 10, 50, seed=2)
    starts, sizes = np.unique(arrivals, return_counts=True)
    assert (sizes == 50).all()
    assert abs(len(starts) - 200) < 5 * 200**0.5


def test_failures_are_counted_by_kind() -> None:
    async def by_turns(number: int) -> bytes | None:
        refusal = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n"
        return [OK, refusal, None][number % 3]

    with http_server(by_turns) as url:
        result = asyncio.run(open_loop(url, requests(url), np.arange(30) / 300.0, max_connections=1))
    assert result.failures == {"connection ended": 10, "429": 10}
    assert result.answered.sum() == 10
    assert result.percentile_ms(99) == float("inf")
    assert result.percentile_ms(99, of_all=False) < 10_000


def test_a_server_that_never_answers_does_not_block_the_client() -> None:
    async def never(number: int) -> bytes:
        await asyncio.Event().wait()
        return OK

    with http_server(never) as url:
        result = asyncio.run(open_loop(url, requests(url), np.zeros(5), drain_s=0.2))
    assert result.failures == {"unanswered": 5}


def test_waiting_for_missing_answers_does_not_lower_the_rate() -> None:
    async def all_but_one(number: int) -> bytes:
        if number == 3:
            await asyncio.Event().wait()
        return OK

    with http_server(all_but_one) as url:
        result = asyncio.run(open_loop(url, requests(url), np.arange(20) / 200.0, drain_s=0.5))
    assert result.failures == {"unanswered": 1}
    last_s = max(result.sent_s.max(), np.nanmax(result.done_s))
    assert last_s <= result.seconds < last_s + 0.25
    assert result.achieved_rate == pytest.approx(19 / result.seconds)


def test_sending_stops_once_too_many_requests_are_late() -> None:
    async def slow(number: int) -> bytes:
        await asyncio.sleep(0.05)
        return OK

    with http_server(slow) as url:
        arrivals = np.arange(2000) / 400.0
        result = asyncio.run(open_loop(url, requests(url), arrivals, limit_s=0.01, allowed_late=0.01))
    assert result.stopped_early
    assert 20 < result.n_sent < 2000


@pytest.mark.parametrize(
    "answer",
    [
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{"a\r\n4\r\n":1}\r\n0\r\n\r\n',
        b'HTTP/1.1 200 OK\r\nServer: x\r\n\r\n{"a":1}',
        b'HTTP/1.1 200 OK\r\ncontent-length: 7\r\nConnection: close\r\n\r\n{"a":1}',
    ],
    ids=["chunked", "until the end", "closing"],
)
def test_bodies_are_read_in_every_framing(answer: bytes) -> None:
    async def given(number: int) -> bytes:
        return answer

    with http_server(given) as url:
        result = asyncio.run(open_loop(url, requests(url), np.arange(5) / 50.0))
    assert result.failures == {}
    assert {json.loads(body)["a"] for body in result.bodies} == {1}


def test_a_closed_loop_keeps_the_given_number_in_flight() -> None:
    now, most = [0], [0]

    async def count(number: int) -> bytes:
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.01)
        now[0] -= 1
        return OK

    with http_server(count) as url:
        result = asyncio.run(closed_loop(url, requests(url), 4, 0.3))
    assert most[0] == 4
    assert result.failures == {}
    assert result.n_sent >= 4


def test_the_command_prints_and_writes_its_results(tmp_path: Path) -> None:
    app = Typer()
    app.command()(main)
    out = tmp_path / "load.json"
    with http_server(answer_at_once) as url:
        done = CliRunner().invoke(app, [url, "--rate", "100", "--seconds", "0.5", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert "the client's own CPU" in done.output
    found = json.loads(out.read_text())
    assert found["sent"] == found["answered"] > 0
    assert found["p99_ms"] >= found["p50_ms"] > 0


def test_a_missing_server_and_an_empty_folder_are_reported(tmp_path: Path) -> None:
    app = Typer()
    app.command()(main)
    with http_server(answer_at_once) as url:
        pass  # closed now
    refused = CliRunner().invoke(app, [url, "--seconds", "0.2"])
    assert "start the server first" in str(refused.exception) + refused.output
    empty = CliRunner().invoke(app, [url, "--images", str(tmp_path)])
    assert empty.exit_code == 2
    assert "holds no image" in " ".join(empty.output.replace("│", " ").split())  # for any terminal width
