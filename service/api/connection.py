"""uvicorn's HTTP connection, hardened against hostile clients and corrected for some legitimate ones.

uvicorn limits neither the size of a head, nor the time it takes, nor the number of pipelined requests. It answers a
malformed request with plain text, ahead of pending answers; it adds trailer fields to the request's header fields; it
reports a disconnect to the latest request only; it drops the body of a request with an Upgrade field, which Java's own
client and curl's `--http2` send with every first request; and it sends chunked bodies to HTTP/1.0 clients.
"""

import asyncio
from functools import partial
from time import perf_counter
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.api.access_log import log_request
from service.api.gate import Gate
from service.api.problems import Problem, broken_request, head_too_large
from service.api.writing import send_unchunked, whole_answer

# Limit on a head, on chunk extensions and on trailers, which the parser would otherwise buffer without bound.
MOST_HEAD_BYTES = 64 * 1024
# Reading pauses while more pipelined requests than this are pending. Data is parsed in pieces, because one read may
# hold thousands of requests, of 20 us and 3 KB each. Smaller pieces cost large pictures more.
MOST_AHEAD = 64
PIECE_BYTES = 16 * 1024
SHOWN_BYTES = 200  # of a path, which may be very long
BODY_FIELDS = (b"content-length", b"transfer-encoding")


class _TooLong(Exception):  # noqa: N818
    """A head is too long. Raised in a parser callback; the parser chains it to its own error."""


class _Flow(FlowControl):
    """Flow control that does not resume reading while too many pipelined requests are pending."""

    is_full = False

    def resume_reading(self) -> None:
        if not self.is_full:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """One connection; `config.app` must be a `Gate`."""

    cycle: Any  # the latest request
    flow: _Flow

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config.app, Gate)
        self.gate = config.app
        self._answering: Any = None  # the request that the application is handling, which may precede `cycle`
        self._ahead = b""  # received, not yet parsed
        self.in_message = False  # whether the parser is inside a request
        self.quiet_since_s = 0.0
        self._head_s = self.gate.desk.state.settings.body_timeout_s  # time limit for a head; the same as for a body
        self._patience_s = self._head_s  # from `quiet_since_s` on
        self._unread_bytes = 0  # since the parser last had a whole head, a part of a body, or the end of one
        self._before_bytes = 0  # that came with the last of those: what is unread may have begun among them
        self._most_bytes = 0  # that a head can have whose end is in what came last
        self._body_fields = b""  # of a head with an Upgrade field
        self._is_repeated = False  # such a head, to a parser that is to go on with its body

    @property
    def is_idle(self) -> bool:
        """Whether no request awaits its answer."""
        return self.cycle is None or self.cycle.response_complete

    # --- called by the transport and the parser -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self.quiet_since_s = self.loop.time()
        self.timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # its timer would keep this connection alive in memory
        self._ahead = b""
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        for start in range(0, len(data), PIECE_BYTES):
            if len(self.pipeline) > MOST_AHEAD:
                self._ahead = data[start:]
                self.flow.is_full = True
                self.flow.pause_reading()
                return
            if not self._take(data[start : start + PIECE_BYTES]):
                return
        if self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_handler()  # the timeout goes on unless the data completed a request

    def on_message_begin(self) -> None:
        if self._is_repeated:
            return
        super().on_message_begin()
        self.in_message = True
        self.quiet_since_s, self._patience_s = self.loop.time(), self._head_s

    def on_url(self, url: bytes) -> None:
        if not self._is_repeated:
            super().on_url(url)

    def on_headers_complete(self) -> None:
        self._bound_head(len(self.url))
        self._unread_bytes = 0
        if self._is_repeated:
            return
        if self.parser.should_upgrade():
            self._body_fields = b"".join(b"%b: %b\r\n" % field for field in self.headers if field[0] in BODY_FIELDS)
        self.begin_request()
        self.headers = []  # trailer fields must not be added to the header fields

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        self.read_body(body)

    def on_message_complete(self) -> None:
        self._bound_head(0)  # counts the trailer fields
        self._unread_bytes = 0
        if not self._body_fields:  # else its body is still to come
            self.in_message = False
            self.end_request()

    def on_response_complete(self) -> None:
        self.quiet_since_s, self._patience_s = self.loop.time(), self.timeout_keep_alive
        self._answering = self.pipeline[-1][0] if self.pipeline else None  # the next
        super().on_response_complete()
        if self._ahead and len(self.pipeline) <= MOST_AHEAD:
            self.loop.call_soon(self._go_on)

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if the time to begin a request, or to complete its head, is over.

        The timer keeps running while requests are in flight; an answer restarts its period.
        """
        self.timeout_keep_alive_task = None
        if not self.is_idle:
            return
        left_s = self.quiet_since_s + self._patience_s - self.loop.time()
        if left_s <= 0:
            super().timeout_keep_alive_handler()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)

    # --- its own ------------------------------------------------------------------------------------------------

    def begin_request(self) -> None:
        """Pass a request whose head is complete to the application."""
        super().on_headers_complete()
        if self.scope["http_version"] != "1.1":
            self.cycle.send = partial(send_unchunked, self.cycle, self.cycle.send)
        if not self.pipeline:
            self._answering = self.cycle

    def read_body(self, body: bytes) -> None:
        """Pass a part of the body to the application."""
        super().on_body(body)

    def end_request(self) -> None:
        """Tell the application that the body is complete."""
        super().on_message_complete()

    def write_answer(
        self, status: int, fields: bytes, body: bytes, request_id: str, traceparent: str | None, keep_alive: bool
    ) -> None:
        """Send a whole answer.

        Args:
            fields: its own header fields, in wire format, without those common to all answers.
        """
        common = self.server_state.default_headers
        self.transport.write(whole_answer(status, fields, common, body, request_id, traceparent, keep_alive))
        if not keep_alive:
            self.transport.close()

    def _go_on(self) -> None:
        """Resume parsing the data that was held back."""
        if self.transport.is_closing():
            return
        data, self._ahead = self._ahead, b""
        self.flow.is_full = False
        self.flow.resume_reading()
        self.data_received(data)

    def _take(self, data: bytes) -> bool:
        """Parse a piece of data; False if the connection accepts no more."""
        self._unread_bytes += len(data)
        self._most_bytes = self._before_bytes + self._unread_bytes
        try:
            self._parse(data)
        except httptools.HttpParserError as error:
            is_too_long = isinstance(error.__context__, _TooLong)
            self._turn_away(head_too_large(MOST_HEAD_BYTES) if is_too_long else broken_request())
            return False
        if not self._unread_bytes:
            self._before_bytes = len(data)
        if self._unread_bytes > MOST_HEAD_BYTES:
            self._turn_away(head_too_large(MOST_HEAD_BYTES))
            return False
        return True

    def _bound_head(self, n_bytes: int) -> None:
        """Raise _TooLong for an oversized head whose end came in the same piece, which `_take` cannot detect.

        Args:
            n_bytes: size of the head besides its fields.
        """
        if self._most_bytes > MOST_HEAD_BYTES:  # counting the fields is slow: only when needed
            n_bytes += sum(len(name) + len(value) + 4 for name, value in self.headers)
            if n_bytes > MOST_HEAD_BYTES:
                raise _TooLong

    def _parse(self, data: bytes) -> None:
        """Feed the parser; raises HttpParserError."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
            fields, self._body_fields = self._body_fields, b""
            if fields:  # the upgrade is ignored (RFC 9110, section 7.8): a new parser reads the body
                self.parser = httptools.HttpRequestParser(self)
                self._is_repeated = True
                self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % fields)
                self._is_repeated = False

    def _turn_away(self, problem: Problem) -> None:
        """Answer with a problem after a parser error, unless it would be taken for the answer to another request."""
        if not self.is_idle and not self.cycle.more_body:
            self.cycle.keep_alive = False  # its answer is the last
            self.flow.pause_reading()
            return
        if self.pipeline:  # its body is malformed: answer the earlier requests first
            self.pipeline[0] = self.cycle, partial(self._turn_away_now, problem)
            self.flow.pause_reading()
            return
        if not self.is_idle and self.cycle.response_started:
            self.transport.close()
            return
        if self.transport.is_closing():
            return
        path = self.url.partition(b"?")[0][:SHOWN_BYTES].decode("latin-1") if self.in_message else ""
        request_id, _ = self.gate.names.read({})
        fields, body = problem.write(path, request_id)
        self.write_answer(problem.status, fields, body, request_id, None, keep_alive=False)
        if self.gate.desk.has_log and self.is_idle:  # else the application logs the request
            client = self.client[0] if self.client else None
            notes = {"problem": problem.kind}
            log_request(request_id, None, client, None, path, problem.status, len(body), perf_counter(), notes)

    async def _turn_away_now(self, problem: Problem, *_: object) -> None:
        """Stands in for the application in the pipeline: answers with the problem when its turn comes."""
        self.cycle.disconnected = self.cycle.response_complete = True  # uvicorn must not answer it as well
        self._turn_away(problem)
