"""Where the server stands between starting and stopping, and the gate that every request passes."""

import os
import re
from collections.abc import Callable
from enum import StrEnum
from itertools import count
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import Problem, not_ready

# Asked by machines that have to hear from a server in any state.
ALWAYS_OPEN = frozenset({"/healthz", "/readyz", "/metrics"})
CLIENTS_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
TRACEPARENT = re.compile(
    rb"(?P<version>[0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-[!-~]{0,64})?"
)


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Lifecycle:
    """One of four phases, and the number of requests in work. Owned by the event loop."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.detail = "The server is warming up: try again in a moment."
        self.requests_in_flight = 0
        self.last_refused_s = 0.0  # monotonic

    @property
    def is_ready(self) -> bool:
        return self.phase is Phase.READY

    def become_ready(self) -> None:
        if self.phase is Phase.STARTING:
            self.phase, self.detail = Phase.READY, "Ready."

    def drain(self) -> None:
        self.phase, self.detail = Phase.DRAINING, "The server is stopping and takes no new work: use another one."

    def fail(self, why: str) -> None:
        self.phase, self.detail = Phase.FAILED, f"The server cannot work, {why}: its log says more; restart it."


class Gate:
    """The outermost application: names every request, counts those in work, and closes when the server drains.

    Requests that came in before are answered to the end, the rest with 503; and every connection is closed with its
    next answer, so that clients and load balancers go elsewhere.

    Args:
        app: what is behind the gate.
        lifecycle: when to close.
        refusal: why a request is not let in while the gate is open, None where it is.
    """

    def __init__(
        self, app: ASGIApp, lifecycle: Lifecycle, refusal: Callable[[Scope], Problem | None] = lambda scope: None
    ) -> None:
        self.app = app
        self.lifecycle = lifecycle
        self.refusal = refusal
        prefix = os.urandom(4).hex()
        self._new_ids = (f"{prefix}-{number:06d}" for number in count(1))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        named = self._names(scope)
        request_id = scope["request_id"]

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), *named]
                if self.lifecycle.phase is Phase.DRAINING:
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        if scope["path"] in ALWAYS_OPEN:
            await self.app(scope, receive, send_named)
            return
        if self.lifecycle.phase is Phase.DRAINING:
            self.lifecycle.last_refused_s = monotonic()
            problem = not_ready(self.lifecycle.detail)
            await problem.response(scope["path"], request_id)(scope, receive, send_named)
            return
        if (refusal := self.refusal(scope)) is not None:
            await refusal.response(scope["path"], request_id)(scope, receive, send_named)
            return
        self.lifecycle.requests_in_flight += 1
        try:
            await self.app(scope, receive, send_named)
        finally:
            self.lifecycle.requests_in_flight -= 1

    def _names(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Name a request and its trace, in its scope; returns the headers that tell the client.

        The client's own id where it sends a decent one, for tracing across services; a new one otherwise.
        """
        request_id = b""
        named: list[tuple[bytes, bytes]] = []
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                request_id = value if CLIENTS_REQUEST_ID.fullmatch(value) else b""
            elif name == b"traceparent" and is_traceparent(value):
                scope["traceparent"] = value.decode()
                named.append((name, value))
        scope["request_id"] = request_id.decode() or next(self._new_ids)
        named.append((b"x-request-id", scope["request_id"].encode()))
        return named


def is_traceparent(value: bytes) -> bool:
    """Whether a header is one of W3C Trace Context (section 3.2): version 00, or a later one with whatever it adds."""
    match = TRACEPARENT.fullmatch(value)
    return match is not None and match["version"] != b"ff" and (match["version"] != b"00" or not match["more"])
