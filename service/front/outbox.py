"""Holds responses back until the others of the same batch are rendered, then writes them together.

The first write wakes the client, which then reads the others as they arrive. If each were written as it is rendered,
the client would be asleep again each time: waking it takes as long as the write, and where the client shares the core
it evicts the worker's code from the cache.
"""

import logging
from collections.abc import Callable
from types import TracebackType

logger = logging.getLogger(__name__)

MOST_HELD = 16  # so that the first of a batch do not wait for its last


class Outbox:
    """Holds writes while it is entered, on one event loop."""

    def __init__(self) -> None:
        self._held: list[Callable[[], object]] = []
        self._is_holding = False

    def put(self, write: Callable[[], object]) -> None:
        """Queue a write behind the earlier ones; outside the context, write immediately."""
        if not self._is_holding:
            write()
            return
        self._held.append(write)
        if len(self._held) >= MOST_HELD:
            self._write_all()

    def __enter__(self) -> None:
        self._is_holding = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_holding = False
        self._write_all()

    def _write_all(self) -> None:
        held, self._held = self._held, []
        for write in held:
            try:
                write()
            except Exception:  # a failed write must not affect other clients
                logger.exception("an answer could not be written")
