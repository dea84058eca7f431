"""Admission control between submitting threads and the engine's thread: their shared state, behind one lock."""

import threading
from collections.abc import Sequence

from service.engine.rows import Request
from service.errors import EngineDraining, EngineError, EngineOverloaded, EngineUnsound


class Admission:
    """Admits requests while the engine is open and has room, and queues them until the engine's thread takes them.

    Args:
        max_rows: requests in flight at once, at most.
    """

    def __init__(self, max_rows: int) -> None:
        self.room_rows = max_rows  # for now; the engine's thread adapts it to the predicted wait (`leave`)
        self.row_s = 0.0  # predicted wait per request in flight
        self.submitted = self.refused = self.in_flight = 0
        self.closed: EngineError | None = EngineDraining("the engine has not been started")
        self._draining = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._arrivals: list[Request] = []
        self._hungry = True  # lanes are free: wake the engine's thread even for a single image
        self._in_haste = False  # an arrival has non-plain options, perhaps a near deadline

    @property
    def is_full(self) -> bool:
        return self.in_flight >= self.room_rows

    @property
    def n_free(self) -> int:
        """How many requests there is room for."""
        return max(0, self.room_rows - self.in_flight)

    def overload(self) -> EngineOverloaded:
        return EngineOverloaded(self.in_flight, self.in_flight * self.row_s)

    def enter(self, request: Request) -> None:
        """Admit a request.

        Raises:
            EngineError: the request was refused; the subclass gives the reason.
        """
        with self._lock:
            self.submitted += 1
            if self.closed is not None or self.in_flight >= self.room_rows:
                self.refused += 1
                raise self.refusal()  # a new exception each time: re-raising one would keep every frame alive
            self.in_flight += 1
            self._arrivals.append(request)
            if not request.options.is_plain:
                self._in_haste = True

    def enter_all(self, requests: Sequence[Request]) -> int:
        """Admit as many of these requests (all with the same options) as there is room for; returns how many.
        The others are not counted as refused: call `refuse` for each."""
        with self._lock:
            n_rows = min(len(requests), self.n_free) if self.closed is None else 0
            self.submitted += n_rows
            self.in_flight += n_rows
            self._arrivals += requests[:n_rows]
            if n_rows and not requests[0].options.is_plain:
                self._in_haste = True
        return n_rows

    def refuse(self) -> EngineError:
        """Count a request as refused; returns the error."""
        with self._lock:
            self.submitted += 1
            self.refused += 1
            return self.refusal()

    def refusal(self) -> EngineError:
        """A new error that says why requests are refused."""
        why = self.closed
        return self.overload() if why is None else type(why)(*why.args)

    def is_to_wake(self) -> bool:
        """Whether to wake the engine's thread for the queued requests; returning True resets the wish to be woken."""
        with self._lock:
            wake = (self._hungry or self._in_haste) and bool(self._arrivals)
            if wake:
                self._hungry = self._in_haste = False
            return wake

    def take(self) -> list[Request]:
        """Return all queued requests and empty the queue."""
        with self._lock:
            arrivals, self._arrivals = self._arrivals, []
            self._in_haste = False
        return arrivals

    def wait_for_one(self, lanes_are_free: bool) -> bool:
        """Prepare for the engine's thread to wait: whether one image will wake it. False if some have arrived."""
        with self._lock:
            self._hungry = lanes_are_free and not self._arrivals
            return self._hungry

    def leave(self, n_rows: int, room_rows: int, row_s: float) -> None:
        """Release requests that have ended, and update the room and the predicted wait per request."""
        with self._lock:
            self.in_flight -= n_rows
            self.room_rows, self.row_s = room_rows, row_s
            self._changed.notify_all()

    def counts(self) -> tuple[int, int, int]:
        """Submitted, refused, in flight."""
        with self._lock:
            return self.submitted, self.refused, self.in_flight

    def open(self) -> None:
        with self._lock:
            self.closed = None

    def close(self, why: EngineError) -> None:
        """Refuse from now on with `why`, or with the earlier reason if already closed."""
        with self._lock:
            self._draining |= not isinstance(why, EngineUnsound)
            self.closed = self.closed or why

    def reopen(self) -> None:
        """Admit again, if closed because the stages could not run and not draining."""
        with self._lock:
            if isinstance(self.closed, EngineUnsound) and not self._draining:
                self.closed = None

    def close_and_wait(self, why: EngineError, timeout_s: float) -> bool:
        """Refuse from now on; True once nothing is in flight, False after `timeout_s`."""
        self.close(why)
        with self._lock:
            return self._changed.wait_for(lambda: self.in_flight == 0, timeout_s)
