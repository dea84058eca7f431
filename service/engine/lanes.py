"""Batches, and the lanes that run them: each thread takes the next batch, runs it, and posts the result."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.exits import confidence
from models.scores import HeadScore, Score
from service.engine.rows import Request
from service.runners.base import Heads, PreparingRunner, Runner, StageOutput
from service.runners.blocks import Block, Gathering, RowState

HISTORY: Final = "score history"
"""Key of the exit score's history among the values of a row's state; names in graphs contain no space."""
TRIAL: Final = -1
"""Stands for a batch's stage: run every stage on blank images, to find out whether the runner works at all."""


@dataclass(slots=True, eq=False)
class Batch:
    """Rows that run one stage together (stages from 0) and, once it has run, the result.

    The runner runs `states`. `places` are the indices of `rows` in it; None if both are the same, in order.
    """

    stage: int
    rows: list[Request]
    states: Sequence[RowState] = ()
    places: Sequence[int] | None = None
    started_s: float = 0.0
    ended_s: float = 0.0
    result: "BatchResult | None" = None  # None if it failed
    error: Exception | None = None
    given_up: bool = False  # its result is to be ignored
    hung: bool = False  # it ran for too long
    behind: "Batch | None" = None  # the batch still running on its lane, behind which it was launched

    def __post_init__(self) -> None:
        self.states = self.states or [row.state for row in self.rows]

    def run_whole_block(self) -> int:
        """Run the whole block in which the rows lie, with those of its rows that have left; returns how many these are.

        If the rows lie in several blocks, or none has left, nothing changes.
        """
        block = self.states[0].block
        n_gone = block.n_rows - len(self.rows)
        if self.states[-1].block is not block or n_gone <= 0:
            return 0
        self.places = [state.index for state in self.states]
        self.states = block.states(range(block.n_rows))
        return n_gone

    @property
    def wants_logits(self) -> bool:
        """Whether a row needs more than its best class."""
        for row in self.rows:  # noqa: SIM110  # mypyc compiles a loop to C, but not `any`
            if row.options.top_k > 1 or not row.options.is_plain:
                return True
        return False


@dataclass(frozen=True, slots=True, eq=False)
class BatchResult:
    """The output of one stage run for the rows of its batch."""

    logits: NDArray[np.float32]  # [rows, classes]; may be `NO_LOGITS` if no row needs more than its best class
    block: Block  # of all rows that ran: see `Batch.places`
    copy_s: float  # spent copying rows into the batch
    classes: list[int]  # the best class
    scores: list[float]  # the exit's score
    confidences: list[float]  # the softmax output of the best class


class Lanes(ABC):
    """Runs batches, one at once on each of the runner's lanes, which the engine's thread puts."""

    is_driven = False
    """Whether batches progress only through `poll`, so that the engine's thread must call it while it waits."""

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def put(self, batch: Batch) -> None: ...

    @property
    @abstractmethod
    def n_waiting(self) -> int:
        """Batches that no lane has taken yet."""

    @abstractmethod
    def poll(self) -> list[Batch]:
        """Return batches that have run or failed, except those that are posted."""

    @abstractmethod
    def stop(self, timeout_s: float) -> None:
        """Let every lane end after the batches already put, and wait for them up to `timeout_s` each."""


class ThreadLanes(Lanes):
    """`runner.n_lanes` threads on one queue. They call `post` with every batch that has run or failed."""

    def __init__(self, runner: Runner, score: Score, post: Callable[[Batch], None]) -> None:
        self._runner = runner
        self._prepare = runner.prepare if isinstance(runner, PreparingRunner) else None
        self._score = score
        self._post = post
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"exitserve-lane-{i + 1}", daemon=True)
            for i in range(runner.n_lanes)
        ]

    @property
    def n_waiting(self) -> int:
        return self._queue.qsize()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def put(self, batch: Batch) -> None:
        self._queue.put(batch)

    def poll(self) -> list[Batch]:
        return []

    def stop(self, timeout_s: float) -> None:
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)

    def _work(self) -> None:
        ran: Batch | None = None  # but is not posted yet: see `_run`
        while True:
            try:
                batch = self._queue.get(block=ran is None)
            except Empty:
                self._post_ran(ran)
                ran = batch = None  # an idle lane must not keep requests alive
                continue
            if batch is None:
                return self._post_ran(ran)
            self._run(batch, ran)
            ran = batch

    def _post_ran(self, batch: Batch | None) -> None:
        if batch is not None:
            self._post(batch)

    def _run(self, batch: Batch, ran: Batch | None) -> None:
        """Run a batch, and post the previous one (`ran`) just before.

        Posting wakes the engine's thread, which takes the interpreter that this lane needs until its stage runs. So
        posting waits until this batch is gathered; otherwise cores stood idle while lanes waited for the interpreter
        (3 to 4 % of the time on two cores).
        """
        batch.started_s = time.perf_counter()
        try:
            try:
                run = self._prepared(batch)
            finally:
                self._post_ran(ran)
            output = run()
            if output is not None:
                batch.result = result_of(self._score, batch, output)
        except Exception as error:  # affects the images of this batch only; the lane goes on
            batch.error = error
        batch.ended_s = time.perf_counter()
        batch.states = ()  # an idle lane must not keep row state alive

    def _prepared(self, batch: Batch) -> Callable[[], StageOutput | None]:
        if batch.stage == TRIAL:
            return self._try_all
        if batch.given_up:
            return lambda: None
        if self._prepare is not None:
            return self._prepare(batch.stage, batch.states)
        return partial(self._runner.run, batch.stage, batch.states)

    def _try_all(self) -> None:
        self._runner.warm_up(0.0)


def result_of(score: Score, batch: Batch, output: StageOutput) -> BatchResult:
    """Compute scores, classes and confidences of a batch's rows from the output of its stage."""
    logits, block, heads = output.logits, output.block, output.heads
    if heads is None and isinstance(score, HeadScore):
        heads = Heads(*score.read(logits))
    if score.history_width:
        history = score.start(block.n_rows) if batch.stage == 0 else Gathering(batch.states).take(HISTORY)
        scores, history = score(batch.stage, logits, history)
        block = Block({**block.values, HISTORY: history}, block.n_rows, block.slots)
    elif heads is not None:
        scores = heads.scores
    else:
        scores = score(batch.stage, logits, score.start(block.n_rows))[0]
    classes = logits.argmax(axis=1) if heads is None else heads.classes
    # Also for rows that go on: on a lane's thread numpy's code is in the CPU cache, on the engine's thread it is not.
    confidences = confidence(logits) if heads is None else heads.confidences
    if batch.places is not None:
        logits = logits[batch.places] if len(logits) else logits
        scores, classes, confidences = scores[batch.places], classes[batch.places], confidences[batch.places]
    return BatchResult(logits, block, output.copy_seconds, classes.tolist(), scores.tolist(), confidences.tolist())
