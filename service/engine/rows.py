"""What goes into the engine and what comes out: options, answers, and the row in between."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from service.budget.controller import Reason
from service.budget.ledger import Account
from service.errors import EngineError
from service.runners.blocks import Block, RowState

ENDED: Final = RowState(Block({}, 0), 0)
"""The state of a row that has ended: whoever keeps its request keeps no memory with it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a request may ask for. One that asks for `top_k` alone is plain, and nothing else is looked at.

    `exit` and `min_confidence` take the place of the server's thresholds; `max_mflops`, `deadline_s` and the ledger end
    the way of an image whatever else was asked for.
    """

    top_k: int = 1
    exit: int | None = None  # answer there, from 1
    min_confidence: float | None = None  # answer at the first exit that is so sure (softmax output)
    max_mflops: float = inf  # go no deeper than this pays for; the first exit is passed in any case
    deadline_s: float = inf  # on the engine's clock: answer then from the head at hand
    steps: bool = False  # tell what every head says that the image goes on from
    is_plain: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        asks_nothing = self.exit is None and self.min_confidence is None and not self.steps
        object.__setattr__(self, "is_plain", asks_nothing and self.max_mflops == self.deadline_s == inf)


PLAIN: Final = Options()


@dataclass(init=False, slots=True)
class Answer:
    """One image's answer. `exit` counts from 1; times are milliseconds, summed over the stages the image ran.

    Its `__init__` is written out, as one that `dataclass` writes is not compiled.
    """

    class_id: int
    label: str
    confidence: float  # largest softmax output of the exit's logits, 0 to 1
    others: tuple[tuple[int, float], ...]  # (class id, softmax output) of the next best, best first, as many as asked
    exit: int
    reason: Reason
    mflops: float  # charged: millions of multiply-adds, cumulative
    queue_ms: float  # the rest of its time in the engine: waiting to be run, and to be seen to have run
    compute_ms: float  # in batches that ran
    batch_rows: int  # rows in the last batch it ran in
    score: float | None  # these two only where steps were asked for: the exit's score,
    threshold: float | None  # and from which the exit would have let any image leave

    def __init__(
        self,
        class_id: int,
        label: str,
        confidence: float,
        others: tuple[tuple[int, float], ...],
        exit: int,
        reason: Reason,
        mflops: float,
        queue_ms: float,
        compute_ms: float,
        batch_rows: int,
        score: float | None = None,
        threshold: float | None = None,
    ) -> None:
        self.class_id = class_id
        self.label = label
        self.confidence = confidence
        self.others = others
        self.exit = exit
        self.reason = reason
        self.mflops = mflops
        self.queue_ms = queue_ms
        self.compute_ms = compute_ms
        self.batch_rows = batch_rows
        self.score = score
        self.threshold = threshold

    @property
    def top_k(self) -> tuple[tuple[int, float], ...]:
        """(class id, softmax output), best first."""
        return ((self.class_id, self.confidence), *self.others)


@dataclass(frozen=True, slots=True)
class Step:
    """What an image's latest head says while it goes on (`Options.steps`); the fields are those of `Answer`."""

    class_id: int
    label: str
    confidence: float
    top_k: tuple[tuple[int, float], ...]
    exit: int
    mflops: float
    score: float
    threshold: float


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """What one exit said of one image."""

    exit: int
    logits: NDArray[np.float32]  # [classes]
    class_id: int
    score: float
    threshold: float  # infinite where no score, or every one, lets an image leave
    batch_rows: int
    mflops: float  # to have come here


Told = Step | Answer | EngineError
Sink = Callable[[list[tuple[Any, Told]]], None]
"""Takes (token, step or outcome) of all requests that one batch has moved or ended, on the engine's thread: it must be
quick, must not raise, and typically hands the list to an event loop with one `call_soon_threadsafe`. A request's steps
come in order and before its outcome."""


class Request:
    """An image on its way through the stages. Owned by the engine's thread from submission on.

    A plain class whose defaults are the class's: so one is made in a third of the time.
    """

    account: Account  # opened when the engine takes it in
    admitted_s = 0.0
    queued_since_s = 0.0
    compute_s = 0.0  # in batches that have come back
    retried_stage = -1  # its batch has failed there, so it runs, or has run, that stage once more, alone
    abandoned = False  # not to be answered any more: its client left, or has its answer from an earlier head
    head: Head | None = None  # the last one passed, of requests with wishes

    def __init__(self, token: Any, sink: Sink, options: Options, state: RowState) -> None:
        self.token, self.sink, self.options = token, sink, options
        self.state = state  # `ENDED` once it has its outcome, or is given up and has come back


def requests_for(tokens: Sequence[Any], sink: Sink, options: Options, states: Sequence[RowState]) -> list[Request]:
    """Requests of images that come together."""
    return [Request(tokens[i], sink, options, state) for i, state in enumerate(states)]
