"""uvicorn's HTTP protocol with a fast path for the most frequent request.

A `POST /classify` with a raw image body and a Content-Length, received together with its head, goes to the desk
(`direct.py`) and is answered by a single write. Everything else stays with uvicorn and the application: other calls,
forms, bodies that arrive in pieces, HTTP/1.0 clients, and pipelined requests.

Clients on a kept-alive connection repeat nearly the same head: one that differs from the previous head only in the
value of Content-Length is not parsed again.
"""

import asyncio
import re
from typing import Any, NamedTuple

from uvicorn.config import Config
from uvicorn.server import ServerState

from service.api.bodies import RAW_TYPES
from service.api.connection import Connection
from service.api.direct import PATH, Visit
from service.api.lifecycle import Phase

TARGET = PATH.encode()
HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,10})\r\n", re.IGNORECASE)
MAX_DIGITS = 10
RAW_TYPE_FIELDS = frozenset(name.encode() for name in RAW_TYPES)


class _Nobody:
    def set(self) -> None:
        """Do nothing: no task waits on a visit."""


class Cycle:
    """Adapts a visit to uvicorn's protocol: the attributes that it reads and writes on its `RequestResponseCycle`."""

    __slots__ = ("body", "disconnected", "headers", "keep_alive", "protocol", "query", "response_complete", "visit")
    message_event = _Nobody()
    more_body = response_started = False  # body and answer are each handled in one piece

    def __init__(self, protocol: "DirectProtocol", headers: dict[bytes, bytes], query: bytes) -> None:
        self.protocol, self.headers, self.query = protocol, headers, query
        self.visit: Visit
        self.body: list[bytes] = []
        self.keep_alive = True
        self.response_complete = self.disconnected = False

    def respond(self, visit: Visit, status: int, fields: bytes, body: bytes) -> None:
        """Send an answer; see `direct.Respond`."""
        self.response_complete = True
        self.protocol.send(visit, status, fields, body, self.keep_alive)


class Head(NamedTuple):
    """The raw and parsed head of a request that went to the desk."""

    before: bytes  # up to the value of Content-Length
    after: bytes  # from after that value to the end of the head
    headers: dict[bytes, bytes]
    query: bytes

    def body_at(self, data: bytes, limit_bytes: int) -> int | None:
        """Return the body's offset in `data` if that is exactly one whole request with this head, else None."""
        if not data.startswith(self.before):
            return None
        start = len(self.before)
        end = data.find(b"\r", start, start + MAX_DIGITS + 1)
        length = data[start:end]
        at = end + len(self.after)
        is_whole = end > 0 and data.startswith(self.after, end) and length.isdigit() and len(data) == at + int(length)
        return at if is_whole and len(data) - at <= limit_bytes else None


class DirectProtocol(Connection):
    """One connection that sends eligible requests to the desk."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._lifecycle = self.gate.lifecycle
        self._desk = self.gate.desk
        self._reading: Cycle | None = None  # a desk request whose body is incomplete
        self._last: Cycle | None = None  # the latest one whose body was complete
        self._head: Head | None = None  # of the latest request, if it arrived as exactly one piece of data

    # --- called by the transport and the parser -----------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        head = self._head
        if head is not None and (body_at := head.body_at(data, self._desk.limit_bytes)) is not None and self._is_free():
            self._repeat(head, data[body_at:])
            return
        self._head = None
        was_between = not self.in_message
        last = self._last
        super().data_received(data)
        if self.transport.is_closing():
            return
        cycle = self._reading
        if cycle is not None and not cycle.response_complete:
            # The body is incomplete: hand the request over to the application, which enforces the body timeout.
            self._reading = None
            self.cycle = None
            super().begin_request()
            for part in cycle.body:
                super().read_body(part)
        elif was_between and not self.in_message and self._last is not None and self._last is not last:
            self._know_again(data, self._last)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._last is not None:
            self._desk.leave(self._last.visit)
        super().connection_lost(exc)

    def cut_off(self) -> None:
        """The drain timeout has passed: answer the visit. The application's requests are cancelled by the server."""
        if self._last is not None:
            self._desk.cut_off(self._last.visit)

    def begin_request(self) -> None:
        path, _, query = self.url.partition(b"?")
        headers = dict(self.headers)
        if path != TARGET or not self._is_direct(query, headers):
            super().begin_request()
            return
        self._reading = self._enter(headers, query)

    def read_body(self, body: bytes) -> None:
        if self._reading is None:
            super().read_body(body)
        elif not self._reading.response_complete:  # else it was refused, and its body is ignored
            self._reading.body.append(body)

    def end_request(self) -> None:
        cycle, self._reading = self._reading, None
        if cycle is None:
            super().end_request()
        elif not cycle.response_complete:
            self._last = cycle
            parts, cycle.body = cycle.body, []  # a long-lived connection must not keep pictures in memory
            self._desk.take(cycle.visit, parts[0] if len(parts) == 1 else b"".join(parts))

    # --- its own ------------------------------------------------------------------------------------------------

    def _is_direct(self, query: bytes, headers: dict[bytes, bytes]) -> bool:
        """Whether the request whose head was just parsed can go to the desk."""
        length = headers.get(b"content-length", b"")
        return (
            headers.get(b"content-type") in RAW_TYPE_FIELDS
            and len(headers) == len(self.headers)  # the application resolves duplicate fields
            and length.isdigit()
            and int(length) <= self._desk.limit_bytes
            and b"transfer-encoding" not in headers
            and b"upgrade" not in headers
            and not self.expect_100_continue
            and not (self.gate.has_origins and b"origin" in headers)  # its answer needs CORS fields
            and b"#" not in query
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and self._is_free()
        )

    def _is_free(self) -> bool:
        """Whether the next request on this connection can go to the desk."""
        return (
            self.is_idle
            and not self.flow.write_paused  # the client is not reading its answers
            and self._desk.is_open
        )

    def _enter(self, headers: dict[bytes, bytes], query: bytes) -> Cycle:
        cycle = Cycle(self, headers, query)
        self.cycle = cycle
        cycle.visit = self._desk.enter(headers, query, self.client[0] if self.client else None, cycle.respond)
        return cycle

    def _know_again(self, data: bytes, cycle: Cycle) -> None:
        """Remember the head of a request if `data` consists of exactly that request."""
        n_bytes = len(data) - int(cycle.headers[b"content-length"])
        found = LENGTH.search(data, 0, n_bytes)
        if found is not None and data.find(HEAD_END) == n_bytes - len(HEAD_END):
            self._head = Head(data[: found.start(1)], data[found.end(1) : n_bytes], cycle.headers, cycle.query)

    def _repeat(self, head: Head, body: bytes) -> None:
        """Handle a whole request whose head equals the remembered one."""
        cycle = self._enter(head.headers, head.query)
        if not cycle.response_complete:
            self._last = cycle
            self._desk.take(cycle.visit, body)

    def send(self, visit: Visit, status: int, fields: bytes, body: bytes, keep_alive: bool) -> None:
        """Write a whole answer, and be ready for the next request."""
        if self.transport.is_closing():
            return
        if self._lifecycle.phase is Phase.DRAINING:
            keep_alive = False
        self.write_answer(status, fields, body, visit.request_id, visit.traceparent, keep_alive)
        if not keep_alive:
            return
        if self.pipeline or self.timeout_keep_alive_task is None or self.flow.read_paused:
            self.on_response_complete()
        else:  # the same, without cancelling and rescheduling the keep-alive timer for each request
            self.server_state.total_requests += 1
            self.quiet_since_s = self.loop.time()
