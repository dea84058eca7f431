"""The server's phase between start and stop, and the ids of its requests."""

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from itertools import count

# For probes and scrapers, which need an answer in every phase.
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
    """The server's phase and its number of requests in flight. Used on the event loop only.

    Attributes:
        is_last_call: draining, but still accepting the requests that were in its sockets when it was told to stop.
        is_cut_off: the drain timeout has passed, and the requests in flight get 503.
    """

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.is_last_call = self.is_cut_off = False
        self.detail = "The server is warming up: try again in a moment."
        self.requests_in_flight = 0
        self.last_refused_s = 0.0  # monotonic

    @property
    def is_ready(self) -> bool:
        return self.phase is Phase.READY

    @property
    def takes_work(self) -> bool:
        return self.is_ready or self.is_last_call

    def become_ready(self) -> None:
        if self.phase is Phase.STARTING:
            self.phase, self.detail = Phase.READY, "Ready."

    def drain(self) -> None:
        """Stop being ready, and close every connection with its next answer."""
        self.is_last_call = self.is_ready
        self.phase, self.detail = Phase.DRAINING, "The server is stopping and accepts no new requests: use another one."

    def close(self) -> None:
        """End the last call: accept no more requests."""
        self.is_last_call = False

    def cut_off(self) -> None:
        """Record that the drain timeout has passed; the caller cancels the requests in flight."""
        self.is_cut_off = True
        if self.phase is Phase.DRAINING:
            self.detail = "The server is stopping, and its drain time is over: use another one."

    def fail(self, why: str) -> None:
        self.phase, self.detail = Phase.FAILED, f"The server has failed: {why}. See its log, and restart it."


class Names:
    """Assigns request ids, which link answers with the logs of every service that a request passed through."""

    def __init__(self) -> None:
        prefix = os.urandom(4).hex()
        self._new_ids = (f"{prefix}-{number:06d}" for number in count(1))

    def read(self, headers: Mapping[bytes, bytes]) -> tuple[str, str | None]:
        """Return a request's id and traceparent (W3C Trace Context) from its header fields, names in lower case.

        The id is the client's `X-Request-ID` if well-formed, else a new one.
        """
        request_id, trace = headers.get(b"x-request-id"), headers.get(b"traceparent")
        decent = request_id is not None and CLIENTS_REQUEST_ID.fullmatch(request_id) is not None
        return (
            request_id.decode() if request_id is not None and decent else next(self._new_ids),
            trace.decode() if trace is not None and is_traceparent(trace) else None,
        )


def is_traceparent(value: bytes) -> bool:
    """Whether a header is one of W3C Trace Context (section 3.2): version 00, or a later one with whatever it adds."""
    match = TRACEPARENT.fullmatch(value)
    return match is not None and match["version"] != b"ff" and (match["version"] != b"00" or not match["more"])
