"""The outermost ASGI application, for every request that does not take the fast path (`direct.py`)."""

import asyncio
import logging
from time import monotonic, perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.access_log import log_request
from service.api.access_log import logger as access_log
from service.api.direct import Desk
from service.api.documents import too_many_bytes
from service.api.lifecycle import ALWAYS_OPEN, Phase
from service.api.origins import Origins
from service.api.problems import Problem, not_ready
from service.logs import NOTES


class Gate:
    """Gives every request an id, counts requests in flight, and refuses new ones while the server drains.

    Requests accepted before the drain are answered normally, later ones with 503; each connection is closed with its
    next answer, so that clients and load balancers go elsewhere.

    Args:
        app: the application behind the gate.
        desk: the fast path, which the protocol uses directly; its requests never come here. Both share the server's
            phase, the admission check and the request ids.
    """

    def __init__(self, app: ASGIApp, desk: Desk) -> None:
        self.app, self.desk = app, desk
        self.lifecycle, self.room, self.names = desk.lifecycle, desk.room, desk.names
        settings = desk.state.settings
        self._most_held_bytes = max(settings.max_held_bytes, settings.max_body_bytes)  # of all requests in flight
        self._held_bytes = 0
        self.has_origins = bool(settings.origins)
        self._entrance: ASGIApp = self._enter
        if self.has_origins:  # wraps refusals too: without CORS fields a page cannot read them
            self._entrance = Origins(self._enter, settings.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id, trace = self.names.read(headers)
        scope["request_id"] = request_id
        named = [(b"x-request-id", request_id.encode())]
        if trace is not None:
            scope["traceparent"] = trace
            named.append((b"traceparent", trace.encode()))
        # A client that sent `Expect: 100-continue` and is refused may withhold its body, so its next request could be
        # mistaken for that body: close the connection (RFC 9110, section 10.1.1).
        is_body_kept = headers.get(b"expect", b"").lower() == b"100-continue"
        held_bytes = 0

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields = [*message.get("headers", ()), *named]
                if is_body_kept or self.lifecycle.phase is Phase.DRAINING:
                    fields.append((b"connection", b"close"))
                message["headers"] = fields
            await send(message)

        async def receive_held() -> Message:
            nonlocal is_body_kept, held_bytes
            is_body_kept = False
            message = await receive()
            n_bytes = len(message.get("body", b""))
            if self._held_bytes + n_bytes > self._most_held_bytes:
                raise too_many_bytes(self._most_held_bytes)
            self._held_bytes += n_bytes
            held_bytes += n_bytes
            return message

        if scope["method"] == "HEAD":  # handled as GET: the protocol drops the body
            scope = {**scope, "method": "GET"}
        try:
            await self._entrance(scope, receive_held, send_named)
        finally:
            self._held_bytes -= held_bytes

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_noted(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._admit(scope, receive, send_noted)
        except asyncio.CancelledError:
            if not self.lifecycle.is_cut_off:
                raise
            if not has_begun:
                await self._refuse(not_ready(self.lifecycle.detail), scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ALWAYS_OPEN:
            await self.app(scope, receive, send)
            return
        if self.lifecycle.phase is Phase.DRAINING and not self.lifecycle.is_last_call:
            self.lifecycle.last_refused_s = monotonic()
            await self._refuse(not_ready(self.lifecycle.detail), scope, receive, send)
            return
        if (refusal := self.room.refusal(scope)) is not None:
            await self._refuse(refusal, scope, receive, send)
            return
        self.lifecycle.requests_in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.lifecycle.requests_in_flight -= 1

    async def _refuse(self, problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
        self.room.note(scope, problem)
        await problem.response(scope["path"], scope["request_id"])(scope, receive, send)


class LoggedGate(Gate):
    """A gate that writes an access log line for every request."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not access_log.isEnabledFor(logging.INFO):
            await super().__call__(scope, receive, send)
            return
        started = perf_counter()
        status = n_bytes = 0
        notes: dict[str, object] = {}
        scope[NOTES] = notes

        async def send_seen(message: Message) -> None:
            nonlocal status, n_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
            elif scope["method"] != "HEAD":  # whose body the protocol drops
                n_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await super().__call__(scope, receive, send_seen)
        finally:
            client = scope.get("client")
            log_request(
                scope["request_id"],
                scope.get("traceparent"),
                client[0] if client else None,
                scope["method"],
                scope["path"],
                status,
                n_bytes,
                started,
                notes,
            )
