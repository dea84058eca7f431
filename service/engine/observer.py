"""What the engine reports to metrics: events as they happen, and a snapshot of its counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.budget.controller import Reason
from service.engine.rows import Answer


class Observer(Protocol):
    """Called on the engine's thread, once per batch: must be quick and must not raise."""

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        """A batch ran `stage` (from 1) in `seconds`; each of its rows had waited `queue_seconds` for it."""
        ...

    def answered(self, answers: Sequence[Answer]) -> None:
        """These images were answered, all at the same exit."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the start, and the engine's present state."""

    submitted: int  # = answered + refused + abandoned + failed + in_flight_rows
    answered: int
    refused: int  # overloaded, draining, stopped, or deadline passed before the first stage
    abandoned: int
    failed: int
    in_flight_rows: int
    queued_rows: tuple[int, ...]  # by stage
    running_batches: int
    failed_batches: int
    hung_batches: int  # given up because they ran for too long
    max_batch_rows: tuple[int, ...]  # by stage: below the configured size if memory was too short
    room_rows: int  # images that may be in flight at the moment
    predicted_wait_s: float  # of an image submitted now
    exits: dict[tuple[int, Reason], int]  # answers by exit (from 1) and reason
    idle_mflops: float  # millions of multiply-adds run for images that had been answered
    latency_limited_s: float  # time during which a latency target held the budget down
