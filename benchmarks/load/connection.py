"""Cheap keep-alive HTTP/1.1 connections, with one request at a time each and minimal parsing of answers.

Client and server share the machine's cores, so every microsecond that the client uses is missing to the server. A full
client library takes several hundred per request.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

CLOSED = 0  # in place of a status: the connection ended before the answer
# Servers close idle connections after a few seconds (uvicorn after 5), possibly while a request is on its way.
MAX_IDLE_S = 2.0
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
CLOSING = re.compile(rb"\r\nconnection:\s*close", re.IGNORECASE)

OnAnswer = Callable[[int, int, bytes], None]  # (index of the request, status or CLOSED, body)


def http_request(url: str, body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a POST to `url`, built once per image, so that sending is one write."""
    parts = urlsplit(url)
    named = {"Host": parts.netloc, "Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return f"POST {target} HTTP/1.1\r\n{lines}\r\n".encode() + body


class Connection(asyncio.Protocol):
    """One connection; `Pool` owns it."""

    def __init__(self, pool: "Pool") -> None:
        self.pool = pool
        self.index: int | None = None  # request in flight
        self.idle_since_s = 0.0
        self._transport: asyncio.Transport
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, index: int, request: bytes) -> None:
        self.index = index
        self._transport.write(request)

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data if self._received else data
        end_of_head = received.find(b"\r\n\r\n")
        if end_of_head < 0:
            return
        head = received[: end_of_head + 2]
        length = CONTENT_LENGTH.search(head)
        if length is not None:
            start = end_of_head + 4
            if len(received) < start + int(length[1]):
                return
            body = received[start:]
        elif CHUNKED.search(head):
            if not received.endswith(b"0\r\n\r\n"):
                return
            body = _join_chunks(received[end_of_head + 4 :])
        else:
            return  # the answer ends with the connection
        self._answered(head, body)

    def connection_lost(self, error: Exception | None) -> None:
        head, found, body = self._received.partition(b"\r\n\r\n")
        if found and self.index is not None and not CONTENT_LENGTH.search(head) and not CHUNKED.search(head):
            self._answered(head + b"\r\nconnection: close", body)
            return
        self.pool.lost(self)

    def _answered(self, head: bytes, body: bytes) -> None:
        index, self.index, self._received = self.index, None, b""
        closing = CLOSING.search(head) is not None
        if index is not None:
            self.pool.answered(self, index, int(head[9:12]), body, closing)


def _join_chunks(data: bytes) -> bytes:
    chunks = []
    while data:
        size, _, data = data.partition(b"\r\n")
        n_bytes = int(size.partition(b";")[0], 16)
        chunks.append(data[:n_bytes])
        data = data[n_bytes + 2 :]
        if n_bytes == 0:
            break
    return b"".join(chunks)


class Pool:
    """A connection per request in flight, up to a maximum; the most recently used one is reused first.

    Args:
        host, port: of the server.
        on_answer: called for every answer, and for every request whose connection ended first.
        max_connections: requests beyond it wait in the client, which counts in their latency.
    """

    def __init__(self, host: str, port: int, on_answer: OnAnswer, max_connections: int) -> None:
        self.host, self.port, self.on_answer, self.max_connections = host, port, on_answer, max_connections
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._n_opening = 0
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def open(self, n_connections: int) -> None:
        """Open connections in advance; OSError if nothing listens."""
        for _ in range(n_connections):
            self._park(await self._connect())

    def send(self, index: int, request: bytes) -> None:
        """Send a request at once on a free connection, or on a new one."""
        oldest_s = perf_counter() - MAX_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since_s >= oldest_s:
                connection.send(index, request)
                return
            connection.close()
        self._waiting.append((index, request))
        self._open_for_waiting()

    def close(self) -> None:
        """Abort all connections; requests in flight are not reported."""
        self._closed = True
        for connection in list(self._all):
            connection.close()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(self), self.host, self.port)
        self._all.add(connection)
        return connection

    def _open_for_waiting(self) -> None:
        """Open another connection if one is needed and allowed."""
        if len(self._all) + self._n_opening < self.max_connections and self._n_opening < len(self._waiting):
            self._n_opening += 1
            task = asyncio.get_running_loop().create_task(self._open_one())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _open_one(self) -> None:
        try:
            connection = await self._connect()
        except OSError:
            self._n_opening -= 1
            if self._waiting:
                self.on_answer(self._waiting.popleft()[0], CLOSED, b"")
            return
        self._n_opening -= 1
        self._park(connection)

    def _park(self, connection: Connection) -> None:
        if self._closed:
            connection.close()
        elif self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            connection.idle_since_s = perf_counter()
            self._idle.append(connection)

    # --- called by connections ----------------------------------------------------------------------------------

    def answered(self, connection: Connection, index: int, status: int, body: bytes, closing: bool) -> None:
        if closing:
            connection.close()
        else:
            self._park(connection)
        if not self._closed:
            self.on_answer(index, status, body)

    def lost(self, connection: Connection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        index, connection.index = connection.index, None
        if self._closed:
            return
        self._open_for_waiting()  # the lost connection no longer counts against the maximum
        if index is not None:
            self.on_answer(index, CLOSED, b"")
