"""Answers that wait to be written until those told with them are rendered as well.

The first one written wakes its client, which takes each of the others as it comes if they come at once. Written as they
are rendered, each finds the client asleep again: to wake it takes as long as the write does, and where the client
shares the core it puts the worker's code out of the cache.
"""

import logging
from collections.abc import Callable
from types import TracebackType

logger = logging.getLogger(__name__)

MOST_HELD = 16  # the first of a batch are not to wait for its last


class Outbox:
    """Holds writes while it is entered, on one event loop."""

    def __init__(self) -> None:
        self._held: list[Callable[[], object]] = []
        self._is_holding = False

    def put(self, write: Callable[[], object]) -> None:
        """Write in a moment, after what was put before; where nothing is held, now."""
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
            except Exception:  # one client's trouble is not that of the others
                logger.exception("an answer could not be written")
