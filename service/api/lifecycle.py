"""Where the server stands between starting and stopping, and what its requests are called."""

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from itertools import count

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
    """One of four phases, and the number of requests in work. Owned by the event loop.

    Attributes:
        is_last_call: the server is stopping, and still takes the requests that its sockets held when it was told to.
        is_cut_off: its time is over, and what is in work is told so.
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
        """Be ready no more, and close every connection with its next answer."""
        self.is_last_call = self.is_ready
        self.phase, self.detail = Phase.DRAINING, "The server is stopping and takes no new work: use another one."

    def close(self) -> None:
        """Take no more work; once draining."""
        self.is_last_call = False

    def cut_off(self) -> None:
        """Answer no more; whoever calls this cancels what is in work."""
        self.is_cut_off = True
        if self.phase is Phase.DRAINING:
            self.detail = "The server is stopping, and its time for answers is over: use another one."

    def fail(self, why: str) -> None:
        self.phase, self.detail = Phase.FAILED, f"The server cannot work, {why}: its log says more; restart it."


class Names:
    """Names requests, so that they are found again: in answers, and in logs of every service that they have passed."""

    def __init__(self) -> None:
        prefix = os.urandom(4).hex()
        self._new_ids = (f"{prefix}-{number:06d}" for number in count(1))

    def read(self, headers: Mapping[bytes, bytes]) -> tuple[str, str | None]:
        """Return a request's id and its trace (W3C Trace Context), by its header fields, names in lower case.

        The client's own id where it sends a decent one; a new one otherwise.
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
