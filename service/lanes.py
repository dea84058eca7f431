"""Threads that run batches: each takes the next one, runs it, and posts what came of it."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from models.exits import confidence
from models.scores import Score as Score
from service.rows import Request
from service.runners.base import Block, Gathering, RowState, Runner

HISTORY = "score history"
"""What the exit score remembers of a row travels as one more value of its state; the space keeps it apart from names
in graphs."""
TRIAL = -1  # in a batch's place for a stage: run every stage on blank images, to see whether they can be run at all


@dataclass(slots=True, eq=False)
class Batch:
    """Rows that run one stage together (stages from 0), and, once they have, what came of it.

    What runs is `states`; `places` says where among these the rows are, None where they are all of them, in order.
    """

    stage: int
    rows: list[Request]
    states: Sequence[RowState] = ()
    places: Sequence[int] | None = None
    started_s: float = 0.0
    ended_s: float = 0.0
    result: "BatchResult | None" = None  # None if it failed
    error: Exception | None = None
    given_up: bool = False  # nobody waits for it any more
    hung: bool = False  # it was running too long

    def __post_init__(self) -> None:
        self.states = self.states or [row.state for row in self.rows]


@dataclass(frozen=True, slots=True, eq=False)
class BatchResult:
    """What one run says of the rows of its batch."""

    logits: NDArray[np.float32]  # [rows, classes]
    block: Block  # of all that ran: see `Batch.places`
    copy_s: float
    classes: list[int]  # the leading class
    scores: list[float]  # the exit's score
    known_confidences: NDArray[np.float64] | None = None  # of all rows, where the runner has worked them out

    def confidences(self, indices: Sequence[int]) -> list[float]:
        """The softmax outputs of the leading classes of some rows."""
        known = self.known_confidences
        shares: list[float] = (confidence(self.logits[indices]) if known is None else known[indices]).tolist()
        return shares


class Lanes:
    """`runner.n_lanes` threads over one queue. `post` is called on them, with every batch once it has run or failed."""

    def __init__(self, runner: Runner, score: Score, post: Callable[[Batch], None]) -> None:
        self._runner = runner
        self._score = score
        self._post = post
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"exitserve-lane-{i + 1}", daemon=True)
            for i in range(runner.n_lanes)
        ]

    def __len__(self) -> int:
        return len(self._threads)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def put(self, batch: Batch) -> None:
        self._queue.put(batch)

    def stop(self, timeout_s: float) -> None:
        """Let every lane end after the batches already put, and wait for them up to `timeout_s` each."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)

    def _work(self) -> None:
        while (batch := self._queue.get()) is not None:
            batch.started_s = time.perf_counter()
            try:
                if batch.stage == TRIAL:
                    self._runner.warm_up(0.0)
                elif not batch.given_up:
                    batch.result = self._run(batch)
            except Exception as error:  # one batch's failure is those images' failure, not the lane's
                batch.error = error
            batch.ended_s = time.perf_counter()
            batch.states = ()  # so that a lane with nothing to do keeps nothing alive
            self._post(batch)

    def _run(self, batch: Batch) -> BatchResult:
        output = self._runner.run(batch.stage, batch.states)
        logits, block, heads = output.logits, output.block, output.heads
        if self._score.history_width:
            history = self._score.start(block.n_rows) if batch.stage == 0 else Gathering(batch.states).take(HISTORY)
            scores, history = self._score(batch.stage, logits, history)
            block = Block({**block.values, HISTORY: history}, block.n_rows, block.slots)
        elif heads is not None:
            scores = heads.scores
        else:
            scores = self._score(batch.stage, logits, self._score.start(block.n_rows))[0]
        classes = logits.argmax(axis=1) if heads is None else heads.classes
        confidences = None if heads is None else heads.confidences
        if batch.places is not None:
            logits, scores, classes = logits[batch.places], scores[batch.places], classes[batch.places]
            confidences = None if confidences is None else confidences[batch.places]
        return BatchResult(logits, block, output.copy_seconds, classes.tolist(), scores.tolist(), confidences)
