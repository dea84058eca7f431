"""Threads that run batches: each takes the next one, runs it, and posts what came of it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import SimpleQueue

from models.scores import Score as Score
from service.rows import Request
from service.runners.base import Block, Gathering, RowState, Runner, StageOutput

HISTORY = "score history"
"""What the exit score remembers of a row travels as one more value of its state; the space keeps it apart from names
in graphs."""
TRIAL = -1  # in a batch's place for a stage: run every stage on blank images, to see whether they can be run at all


@dataclass(slots=True, eq=False)
class Batch:
    """Rows that run one stage together (stages from 0), and, once they have, what came of it."""

    stage: int
    rows: list[Request]
    started_s: float = 0.0
    ended_s: float = 0.0
    result: "BatchResult | None" = None  # None if it failed
    error: Exception | None = None
    given_up: bool = False  # nobody waits for it any more
    hung: bool = False  # it was running too long


@dataclass(frozen=True, slots=True, eq=False)
class BatchResult:
    """What one run says of every row of its batch."""

    output: StageOutput
    classes: list[int]  # the leading class
    scores: list[float]  # the exit's score


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
            self._post(batch)

    def _run(self, batch: Batch) -> BatchResult:
        states = [row.state for row in batch.rows]
        output = self._runner.run(batch.stage, states)
        if self._score.history_width:
            output, scores = self._score_with_history(batch.stage, states, output)
        else:
            scores = self._score(batch.stage, output.logits, self._score.start(len(states)))[0].tolist()
        return BatchResult(output, output.logits.argmax(axis=1).tolist(), scores)

    def _score_with_history(
        self, stage: int, states: list[RowState], output: StageOutput
    ) -> tuple[StageOutput, list[float]]:
        history = self._score.start(len(states)) if stage == 0 else Gathering(states).take(HISTORY)
        scores, history = self._score(stage, output.logits, history)
        block = Block({**output.block.values, HISTORY: history}, output.block.n_rows)
        return replace(output, block=block), scores.tolist()
