"""Messages to the engine's thread, other than arriving images and completed batches."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from service.engine.rows import Request

T = TypeVar("T")


def next_message(inbox: SimpleQueue[T], timeout_s: float) -> T | None:
    """The next message, or None if none comes within `timeout_s`, which may be inf. For a single consumer thread.

    In Python 3.11, `SimpleQueue.get` may wait for ever whatever its timeout: if a message that was put during a wait is
    then taken without one, the next `get` restarts with the time that is left, and treats a negative time as no limit.
    Trying `get_nowait` first avoids that.
    """
    if timeout_s == inf:
        return inbox.get()
    with suppress(Empty):
        return inbox.get_nowait()
    with suppress(Empty):
        return inbox.get(timeout=max(0.0, timeout_s))
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Abandon:
    """A request's client has left."""

    request: Request


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A function that reads or changes what the thread owns."""

    function: Callable[[], Any]
    future: "Future[Any]" = field(default_factory=Future)

    def run(self) -> None:
        """Run it here and now; its future gets what it returns or raises."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except Exception as error:
            self.future.set_exception(error)


class Wake:
    """Wakes the engine's thread: images have arrived while lanes are free, or a batch has run."""


class Stop:
    """End the engine's thread after the messages received so far."""


Message = Abandon | Call | Wake | Stop
