"""Threads that run batches: each takes the next one, runs it, and posts what came of it."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.exits import confidence
from models.scores import HeadScore
from models.scores import Score as Score
from service.rows import Request
from service.runners.base import Heads, LaunchingRunner, Pending, PreparingRunner, Runner, StageOutput
from service.runners.blocks import Block, Gathering, RowState

HISTORY: Final = "score history"
"""What the exit score remembers of a row travels as one more value of its state; the space keeps it apart from names
in graphs."""
TRIAL: Final = -1
"""In a stage's place in a batch: run every stage on blank images, to see whether they can be run at all."""


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
    behind: "Batch | None" = None  # the one that its lane runs before it, which it has already been launched behind
    pending: Pending | None = None  # of a batch that was launched before a lane has got it

    def __post_init__(self) -> None:
        self.states = self.states or [row.state for row in self.rows]


@dataclass(frozen=True, slots=True, eq=False)
class BatchResult:
    """What one run says of the rows of its batch."""

    logits: NDArray[np.float32]  # [rows, classes]; perhaps `NO_LOGITS` where no row asks for more than its best class
    block: Block  # of all that ran: see `Batch.places`
    copy_s: float
    classes: list[int]  # the leading class
    scores: list[float]  # the exit's score
    confidences: list[float]  # the softmax output of the leading class


class Lanes:
    """`runner.n_lanes` threads over one queue. `post` is called on them, with every batch once it has run or failed."""

    def __init__(self, runner: Runner, score: Score, post: Callable[[Batch], None]) -> None:
        self._runner = runner
        self._prepare = runner.prepare if isinstance(runner, PreparingRunner) else None
        self._launch = runner.launch if isinstance(runner, LaunchingRunner) else None
        self._score = score
        self._post = post
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"exitserve-lane-{i + 1}", daemon=True)
            for i in range(runner.n_lanes)
        ]

    def __len__(self) -> int:
        return len(self._threads)

    @property
    def n_waiting(self) -> int:
        """Batches that no lane has taken yet."""
        return self._queue.qsize()

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def put(self, batch: Batch) -> None:
        self._queue.put(batch)

    @property
    def can_run_here(self) -> bool:
        return self._launch is not None

    def run_here(self, batch: Batch, is_wanted: Callable[[], bool]) -> None:
        """Run a batch on the caller's thread: to hand it over and take it back takes longer than a GPU does for one
        image. As soon as the caller is wanted elsewhere, a lane goes on with it.

        No other batch may be with the lanes, nor one that was given up: a launch would wait for it.
        """
        assert self._launch is not None
        launched = self._launched(batch, self._launch, None)
        if launched is None:
            return
        batch.pending = pending = launched[1]
        while not _has_run(pending):
            if pending.has_run is None or is_wanted():
                return self._queue.put(batch)
            time.sleep(0)  # others may have the interpreter
        batch.pending = None
        self._collect(batch, pending)

    def stop(self, timeout_s: float) -> None:
        """Let every lane end after the batches already put, and wait for them up to `timeout_s` each."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)

    def _work(self) -> None:
        if self._launch is not None:
            return self._work_ahead(self._launch)
        ran: Batch | None = None  # and not posted yet: see `_run`
        while True:
            try:
                batch = self._queue.get(block=ran is None)
            except Empty:
                self._post_ran(ran)
                ran = batch = None  # a lane that waits keeps no request alive
                continue
            if batch is None:
                return self._post_ran(ran)
            self._run(batch, ran)
            ran = batch

    def _work_ahead(self, launch: Callable[..., Pending]) -> None:
        """As `_work`, where a batch can be put behind the one that runs: it is, before that one is waited for."""
        running: tuple[Batch, Pending] | None = None
        stops = False
        while not stops or running is not None:
            batch = following = None
            if not stops:
                with suppress(Empty):
                    batch = self._queue.get(block=running is None)
                    stops = batch is None
            if batch is not None and batch.pending is not None:
                following, batch.pending = (batch, batch.pending), None
                batch = None
            alone = batch is not None and (batch.stage == TRIAL or batch.given_up)
            if batch is not None and not alone:
                following = self._launched(batch, launch, running)
            if running is not None:
                self._collect(*running)
            if batch is not None and alone:
                self._run(batch, None)
                self._post(batch)
            running, batch = following, None
            if running is not None and running[0].behind is not None:
                running[0].started_s, running[0].behind = time.perf_counter(), None

    def _launched(
        self, batch: Batch, launch: Callable[..., Pending], running: tuple[Batch, Pending] | None
    ) -> tuple[Batch, Pending] | None:
        """Launch a batch; None where that failed, and it was posted. It has started once those before it are back."""
        if running is None:
            batch.started_s = time.perf_counter()
        else:
            batch.behind = running[0]
        try:
            with_logits = any(row.options.top_k > 1 or not row.options.is_plain for row in batch.rows)
            return batch, launch(batch.stage, batch.states, running and running[1], with_logits)
        except Exception as error:  # as in `_run`
            batch.error = error
        batch.ended_s = time.perf_counter()
        batch.started_s = batch.started_s or batch.ended_s
        batch.states = ()
        self._post(batch)
        return None

    def _collect(self, batch: Batch, pending: Pending) -> None:
        try:
            batch.result = self._result(batch, pending.collect())
        except Exception as error:  # as in `_run`
            batch.error = error
        batch.ended_s = time.perf_counter()
        batch.states = ()
        self._post(batch)

    def _post_ran(self, batch: Batch | None) -> None:
        if batch is not None:
            self._post(batch)

    def _run(self, batch: Batch, ran: Batch | None) -> None:
        """Run a batch, having posted the one before.

        Posting wakes the engine's thread, which takes the interpreter that this lane needs until its stage runs. So it
        waits until the rows of this batch lie together: before, cores stood idle while lanes waited for the interpreter
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
                batch.result = self._result(batch, output)
        except Exception as error:  # one batch's failure is those images' failure, not the lane's
            batch.error = error
        batch.ended_s = time.perf_counter()
        batch.states = ()  # so that a lane with nothing to do keeps nothing alive

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

    def _result(self, batch: Batch, output: StageOutput) -> BatchResult:
        logits, block, heads = output.logits, output.block, output.heads
        if heads is None and isinstance(self._score, HeadScore):
            heads = Heads(*self._score.read(logits))
        if self._score.history_width:
            history = self._score.start(block.n_rows) if batch.stage == 0 else Gathering(batch.states).take(HISTORY)
            scores, history = self._score(batch.stage, logits, history)
            block = Block({**block.values, HISTORY: history}, block.n_rows, block.slots)
        elif heads is not None:
            scores = heads.scores
        else:
            scores = self._score(batch.stage, logits, self._score.start(block.n_rows))[0]
        classes = logits.argmax(axis=1) if heads is None else heads.classes
        # Of rows that go on as well: here numpy's code is in the cache, on the engine's thread it is not.
        confidences = confidence(logits) if heads is None else heads.confidences
        if batch.places is not None:
            logits = logits[batch.places] if len(logits) else logits
            scores, classes, confidences = scores[batch.places], classes[batch.places], confidences[batch.places]
        return BatchResult(logits, block, output.copy_seconds, classes.tolist(), scores.tolist(), confidences.tolist())


def _has_run(pending: Pending) -> bool:
    try:
        return pending.has_run is not None and pending.has_run()
    except Exception:
        return True  # it has failed: to collect it says how
