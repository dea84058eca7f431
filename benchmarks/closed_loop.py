"""Closed-loop load on an engine: a constant number of images in flight. Imports nothing that the engine does not."""

import threading
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.engine.engine import Engine
from service.engine.rows import Answer, Told
from service.errors import EngineError

Images = NDArray[np.uint8]
SAMPLED = 8  # one answer in 8 is recorded, since recording takes time of the engine's thread
STALLED_S = 60.0  # after this time without an answer, the run is given up


@dataclass(frozen=True)
class Round:
    """Results of one run."""

    images_per_s: float
    shares: list[float]  # share of the images by exit
    mean_mflops: float
    mean_batch_rows: float  # of the batch that an image left from
    median_ms: float  # time in the engine
    idle_mflops: float  # per image, run for images that were already answered


class Load:
    """Keeps `n_in_flight` images in an engine until all are answered.

    Args:
        images: [any, H, W, 3], sent in turn.
        n_images: number to send; by default, each once.
    """

    def __init__(self, engine: Engine, images: Images, n_in_flight: int, n_images: int | None = None) -> None:
        self._batch_rows = 0  # sum over one answer in `SAMPLED`; answers are not kept, as a server keeps none either,
        self._ms = array("d")  # and the garbage collector would traverse them again and again
        self._engine = engine
        self._images = images
        self._n_images = n_images or len(images)
        self._room: SimpleQueue[int] = SimpleQueue()  # how many images may be sent, per batch of answers
        self._room.put(n_in_flight)
        self._done = threading.Event()
        self._n_ended = 0
        self._failed: EngineError | None = None

    def run(self) -> Round:
        """Send all images, and wait for the answers.

        Raises:
            EngineError: an image was not answered.
            TimeoutError: no answer for `STALLED_S`.
        """
        before, spent_mflops = self._engine.stats(), self._engine.budget_state().spent_answered_mflops
        started = time.perf_counter()
        n_sent = 0
        take = self._take
        while n_sent < self._n_images:  # in groups as they were answered, as HTTP workers do
            n_more = min(self._wait_for_room(), self._n_images - n_sent)
            which: list[int] = []
            while len(which) < n_more:
                first = (n_sent + len(which)) % len(self._images)
                which += range(first, min(first + n_more - len(which), len(self._images)))
            self._engine.submit_all(take, [None] * n_more, self._images, which)
            self._engine.flush()
            n_sent += n_more
        n_ended = -1
        while not self._done.wait(STALLED_S):
            if n_ended == self._n_ended:
                raise TimeoutError(f"no answer for {STALLED_S:.0f} s, {self._n_images - n_ended} are missing")
            n_ended = self._n_ended
        seconds = time.perf_counter() - started
        if self._failed is not None:
            raise self._failed
        after, n_answers = self._engine.stats(), self._n_images
        exits: Counter[int] = Counter()
        for (number, reason), count in after.exits.items():
            exits[number] += count - before.exits.get((number, reason), 0)
        if exits.total() != n_answers:
            raise EngineError(f"{n_answers} images were sent, and {exits.total()} were answered")
        return Round(
            images_per_s=n_answers / seconds,
            shares=[exits[k] / n_answers for k in range(1, len(self._engine.stage_seconds) + 1)],
            mean_mflops=(self._engine.budget_state().spent_answered_mflops - spent_mflops) / n_answers,
            mean_batch_rows=self._batch_rows / len(self._ms),
            median_ms=median(self._ms),
            idle_mflops=(after.idle_mflops - before.idle_mflops) / n_answers,
        )

    def _wait_for_room(self) -> int:
        try:
            return self._room.get(timeout=STALLED_S)
        except Empty:
            raise TimeoutError(f"no answer for {STALLED_S:.0f} s") from None

    def _take(self, outcomes: list[tuple[Any, Told]]) -> None:
        """Receive outcomes, on the engine's thread."""
        answers: list[Any] = [outcome for _, outcome in outcomes]
        if set(map(type, answers)) != {Answer}:
            self._failed = next(outcome for outcome in answers if isinstance(outcome, EngineError))
            answers = [outcome for outcome in answers if isinstance(outcome, Answer)]
        for answer in answers[-self._n_ended % SAMPLED :: SAMPLED]:
            self._batch_rows += answer.batch_rows
            self._ms.append(answer.queue_ms + answer.compute_ms)
        self._n_ended += len(outcomes)
        self._room.put(len(outcomes))
        if self._n_ended == self._n_images:
            self._done.set()


def ideal_rate(row_seconds: Sequence[float], shares: Sequence[float], n_lanes: int) -> float:
    """Images/s if each stage takes its `row_seconds` for exactly the images that reach it, on `n_lanes` lanes."""
    reaching, seconds = 1.0, 0.0
    for stage_seconds, share in zip(row_seconds, shares, strict=True):
        seconds += reaching * stage_seconds
        reaching -= share
    return n_lanes / seconds
