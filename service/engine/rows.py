"""The engine's inputs and outputs (options, answers, steps), and the request that it keeps between them."""

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
"""The state of a row that has ended, so that a reference to its request does not keep its memory alive."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a request. One that sets at most `top_k` is plain, and its other options are never read.

    `exit` and `min_confidence` replace the server's thresholds; `max_mflops`, `deadline_s` and the ledger end an image
    whatever its other options.
    """

    top_k: int = 1
    exit: int | None = None  # answer at this exit, from 1
    min_confidence: float | None = None  # answer at the first exit whose largest softmax output reaches this
    max_mflops: float = inf  # run no stage beyond this cumulative cost; the first stage always runs
    deadline_s: float = inf  # on the engine's clock: answer then from the last head passed
    steps: bool = False  # deliver a `Step` for every exit that the image goes on from
    is_plain: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        asks_nothing = self.exit is None and self.min_confidence is None and not self.steps
        object.__setattr__(self, "is_plain", asks_nothing and self.max_mflops == self.deadline_s == inf)


PLAIN: Final = Options()


@dataclass(init=False, slots=True)
class Answer:
    """One image's answer. `exit` counts from 1; times are milliseconds, summed over the stages that the image ran.

    `__init__` is written out because mypyc does not compile the one that `dataclass` generates.
    """

    class_id: int
    label: str
    confidence: float  # largest softmax output of the exit's logits, 0 to 1
    others: tuple[tuple[int, float], ...]  # (class id, softmax output) of the next best classes, `top_k` - 1 at most
    exit: int
    reason: Reason
    mflops: float  # charged: millions of multiply-adds, cumulative
    queue_ms: float  # the rest of its time in the engine: before batches run, and until their results are processed
    compute_ms: float  # in batches that ran
    batch_rows: int  # rows of the last batch in which it ran
    score: float | None  # the exit's score; like `threshold`, only if `steps` were requested
    threshold: float | None  # the exit's threshold, at which any image would have left

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
    """The result of an exit that an image goes on from (`Options.steps`); fields as in `Answer`."""

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
    """The output of one exit for one image."""

    exit: int
    logits: NDArray[np.float32]  # [classes]
    class_id: int
    score: float
    threshold: float  # +inf if no score lets an image leave here, -inf if every score does
    batch_rows: int
    mflops: float  # charged up to this exit


Told = Step | Answer | EngineError
Sink = Callable[[list[tuple[Any, Told]]], None]
"""Receives (token, step or outcome) of all its requests that a batch has moved or ended, on the engine's thread: must
be quick and must not raise. Typically it passes the list to an event loop with one `call_soon_threadsafe`. A request's
steps come in order and before its outcome."""


class Request:
    """An image on its way through the stages. Owned by the engine's thread from submission on.

    A plain class with class attributes as defaults: creating one takes a third of the time.
    """

    account: Account  # set on admission
    admitted_s = 0.0
    queued_since_s = 0.0
    compute_s = 0.0  # in batches that have returned
    retried_stage = -1  # the stage at which its batch failed, and which it therefore runs, or has run, again alone
    abandoned = False  # gets no (further) outcome: its client left, or was answered from an earlier head
    head: Head | None = None  # the last one passed; only kept for requests that are not plain

    def __init__(self, token: Any, sink: Sink, options: Options, state: RowState) -> None:
        self.token, self.sink, self.options = token, sink, options
        self.state = state  # `ENDED` once it has an outcome or, if abandoned, once no batch runs it any more


def requests_for(tokens: Sequence[Any], sink: Sink, options: Options, states: Sequence[RowState]) -> list[Request]:
    """Requests for images submitted together."""
    return [Request(tokens[i], sink, options, state) for i, state in enumerate(states)]
