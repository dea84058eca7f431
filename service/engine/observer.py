"""What the engine tells of itself: calls as things happen, and a snapshot of its counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.budget.controller import Reason
from service.engine.rows import Answer


class Observer(Protocol):
    """Told of what happens, on the engine's thread, a batch at a time: it must be quick and must not raise."""

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        """A batch ran `stage` (from 1) in `seconds`; its rows, an entry each, had waited `queue_seconds` for it."""
        ...

    def answered(self, answers: Sequence[Answer]) -> None:
        """These images left, all at one exit."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the start, and what is in the engine now."""

    submitted: int  # = answered + refused + abandoned + failed + in_flight_rows
    answered: int
    refused: int  # overloaded, draining, stopped, or too late to begin
    abandoned: int
    failed: int
    in_flight_rows: int
    queued_rows: tuple[int, ...]  # by stage
    running_batches: int
    failed_batches: int
    hung_batches: int  # given up, having run too long
    max_batch_rows: tuple[int, ...]  # by stage: fewer than were set where memory was too short
    room_rows: int  # images that may be in flight at the moment
    predicted_wait_s: float  # of an image that came now
    exits: dict[tuple[int, Reason], int]  # answers by exit (from 1) and reason
    idle_mflops: float  # millions of multiply-adds run for images that had answered
    latency_limited_s: float  # in which a latency target held the budget down
