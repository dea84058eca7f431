"""What the engine's thread is told, besides the images that arrive and the batches that have run."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from service.rows import Request


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
    """Images have arrived, and lanes are free."""


class Stop:
    """Take nothing more after the work at hand."""
