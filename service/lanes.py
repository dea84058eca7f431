"""Threads that run batches: each takes the next one, runs it, and posts what came of it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from models.exits import Logits
from service.rows import Request
from service.runners.base import Runner, StageOutput

Score = Callable[[Logits], NDArray[np.float64]]


@dataclass(slots=True, eq=False)
class Batch:
    """Rows that run one stage together (stages from 0), and, once they have, what came of it."""

    stage: int
    rows: list[Request]
    started_s: float = 0.0
    ended_s: float = 0.0
    result: "BatchResult | None" = None  # None if it failed
    error: Exception | None = None


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
                batch.result = self._run(batch)
            except Exception as error:  # one batch's failure is those images' failure, not the lane's
                batch.error = error
            batch.ended_s = time.perf_counter()
            self._post(batch)

    def _run(self, batch: Batch) -> BatchResult:
        output = self._runner.run(batch.stage, [row.state for row in batch.rows])
        return BatchResult(output, output.logits.argmax(axis=1).tolist(), self._score(output.logits).tolist())
