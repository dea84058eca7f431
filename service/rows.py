"""What goes into the engine and what comes out: options, answers, errors, and the row in between."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from service.budget import Reason
from service.ledger import Account
from service.runners.base import Block, RowState

ENDED = RowState(Block({}, 0), 0)
"""The state of a row that has ended: whoever keeps its request keeps no memory with it."""


class EngineError(RuntimeError):
    """A request got no answer; the message names the cause."""


class EngineDraining(EngineError):  # noqa: N818 (a state, not a fault)
    """The engine is stopping (or has stopped) and takes no new requests."""


class EngineOverloaded(EngineError):  # noqa: N818
    """As many rows are in flight as the engine holds."""

    def __init__(self, in_flight_rows: int) -> None:
        super().__init__(f"{in_flight_rows} images are in flight, as many as the engine holds: try again later")
        self.in_flight_rows = in_flight_rows


@dataclass(frozen=True, slots=True)
class Options:
    """What a request may ask for."""

    top_k: int = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """One image's answer. `exit` counts from 1; times are milliseconds, summed over the stages the image ran."""

    class_id: int
    label: str
    confidence: float  # largest softmax output of the exit's logits, 0 to 1
    top_k: tuple[tuple[int, float], ...]  # (class id, softmax output), best first
    exit: int
    reason: Reason
    mflops: float  # charged: millions of multiply-adds, cumulative
    queue_ms: float  # waiting to be run
    compute_ms: float  # in batches that ran
    batch_rows: int  # rows in the last batch it ran in


Outcome = Answer | EngineError
Sink = Callable[[list[tuple[Any, Outcome]]], None]
"""Takes (token, outcome) of all requests that one batch has ended, on the engine's thread: it must be quick, must not
raise, and typically hands the list to an event loop with one `call_soon_threadsafe`."""


@dataclass(slots=True, eq=False)
class Request:
    """An image on its way through the stages. Owned by the engine's thread from submission on."""

    token: Any
    sink: Sink
    options: Options
    state: RowState
    account: Account = field(default_factory=lambda: Account(0, 0))  # opened when the engine takes it in
    queued_since_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    abandoned: bool = False
