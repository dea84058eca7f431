"""uvicorn's HTTP protocol, with a way of its own for the requests of which there are thousands a second.

A `POST /classify` whose body is the image, announced by its length and there with its head, goes to the desk
(`direct.py`) and is answered by one write. Everything else stays with uvicorn and the application: other calls, forms,
bodies that arrive in pieces, old clients, and what comes before the request ahead of it is answered (pipelining).
"""

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.api.bodies import RAW_TYPES
from service.api.direct import PATH, Visit
from service.api.gate import Gate
from service.api.lifecycle import Phase

TARGET = PATH.encode()
RAW_TYPE_FIELDS = frozenset(name.encode() for name in RAW_TYPES)


class _Nobody:
    def set(self) -> None:
        """Wake nobody: no task waits for what becomes of a visit."""


class Cycle:
    """A visit, as uvicorn's protocol knows requests: what it reads and writes of its own `RequestResponseCycle`."""

    __slots__ = ("body", "disconnected", "keep_alive", "protocol", "response_complete", "visit")
    message_event = _Nobody()

    def __init__(self, protocol: "DirectProtocol") -> None:
        self.protocol = protocol
        self.visit: Visit
        self.body: list[bytes] = []
        self.keep_alive = True
        self.response_complete = self.disconnected = False

    def respond(self, visit: Visit, status: int, fields: bytes, body: bytes) -> None:
        """Send an answer; see `direct.Respond`."""
        self.response_complete = True
        self.protocol.send(visit, status, fields, body, self.keep_alive)


class DirectProtocol(HttpToolsProtocol):
    """One connection. `config.app` is a `Gate`."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config.app, Gate)
        self._lifecycle = config.app.lifecycle
        self._desk = config.app.desk
        self._reading: Cycle | None = None  # whose body is still to come
        self._last: Cycle | None = None  # the latest whose body was there

    # --- called by the transport and the parser -----------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        cycle = self._reading
        if cycle is None or cycle.response_complete or self.transport.is_closing():
            return
        # A body that takes its time: the application knows how much of that it may have.
        self._reading = None
        self.cycle = None  # type: ignore[assignment]
        super().on_headers_complete()
        for part in cycle.body:
            super().on_body(part)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._last is not None:
            self._desk.leave(self._last.visit)
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        path, _, query = self.url.partition(b"?")
        headers = dict(self.headers)
        if path != TARGET or not self._is_direct(query, headers):
            super().on_headers_complete()
            return
        cycle = self._reading = Cycle(self)
        self.cycle = cycle  # type: ignore[assignment]
        cycle.visit = self._desk.enter(headers, query, self.client[0] if self.client else None, cycle.respond)

    def on_body(self, body: bytes) -> None:
        if self._reading is None:
            super().on_body(body)
        elif not self._reading.response_complete:  # else it was refused, and nobody wants it
            self._reading.body.append(body)

    def on_message_complete(self) -> None:
        cycle, self._reading = self._reading, None
        if cycle is None:
            super().on_message_complete()
        elif not cycle.response_complete:
            self._last = cycle
            parts, cycle.body = cycle.body, []  # the connection may live long, and is to keep no picture
            self._desk.take(cycle.visit, parts[0] if len(parts) == 1 else b"".join(parts))

    # --- its own ------------------------------------------------------------------------------------------------

    def _is_direct(self, query: bytes, headers: dict[bytes, bytes]) -> bool:
        """Whether the request that begins is one for the desk."""
        length = headers.get(b"content-length", b"")
        return (
            headers.get(b"content-type") in RAW_TYPE_FIELDS
            and length.isdigit()
            and int(length) <= self._desk.limit_bytes
            and b"transfer-encoding" not in headers
            and b"upgrade" not in headers
            and not self.expect_100_continue
            and b"#" not in query
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused  # its client does not read what it is told
            and self._desk.is_open
        )

    def send(self, visit: Visit, status: int, fields: bytes, body: bytes, keep_alive: bool) -> None:
        """Write a whole answer, and be ready for the next request."""
        if self.transport.is_closing():
            return
        if self._lifecycle.phase is Phase.DRAINING:
            keep_alive = False
        parts = [STATUS_LINE[status], fields, b"content-length: %d\r\nx-request-id: " % len(body)]
        parts += (visit.request_id.encode(), b"\r\n")
        for name, value in self.server_state.default_headers:
            parts += (name, b": ", value, b"\r\n")
        if visit.traceparent is not None:
            parts += (b"traceparent: ", visit.traceparent.encode(), b"\r\n")
        if not keep_alive:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", body)
        self.transport.write(b"".join(parts))
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()
