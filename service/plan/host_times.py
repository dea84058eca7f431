"""Measures the engine's own CPU time beside real stages: these evict its cache, which adds half as much again."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from statistics import median
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from service.assembly import default_burst_images
from service.budget.controller import BudgetController
from service.engine.engine import Engine
from service.engine.observer import Observer
from service.engine.rows import Answer, Told
from service.engine.scheduler import Scheduler
from service.runners.onnx import OnnxRunner

HOST_S = 0.7  # length of a run, within the limits on its images
FEWEST_IMAGES, MOST_IMAGES = 16, 1_200


@dataclass(slots=True)
class _Counter(Observer):
    """Counts batches."""

    n_batches: int = 0

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        self.n_batches += 1

    def answered(self, answers: Sequence[Answer]) -> None:
        pass


class _DrawnScore:
    """Scores drawn from held-out images at each exit, so that images go about as deep as real ones."""

    history_width = 0

    def __init__(self, scores: NDArray[Any]) -> None:
        self._scores = scores.astype(np.float64)
        self._rng = np.random.default_rng(0)

    def start(self, n_rows: int) -> NDArray[np.float64]:
        return np.empty((n_rows, 0))

    def __call__(
        self, exit_index: int, logits: NDArray[Any], history: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self._scores[self._rng.integers(0, len(self._scores), len(logits)), exit_index], history


def measure_host(
    bundle: Bundle, runner: OnnxRunner, stage_seconds: Sequence[Mapping[int, float]]
) -> tuple[float, float]:
    """Return host CPU seconds per image and per batch, from runs with one image in flight and runs with full batches.

    Counts the submitting thread and the engine's thread; lanes' work for a batch is part of its stage's time.
    """
    counter = _Counter()
    scores = bundle.calibration.scores[bundle.manifest.score]
    costs_mflops = bundle.costs_mflops
    engine = Engine(
        runner,
        BudgetController(
            bundle.frontier(),
            costs_mflops,
            0.5 * (costs_mflops[0] + costs_mflops[-1]),
            default_burst_images(runner.n_lanes, runner.max_rows),
        ),
        Scheduler(runner.n_stages, runner.max_rows),
        _DrawnScore(scores),
        bundle.manifest.class_names,
        observer=counter,
    )
    engine.start()
    try:
        image = np.zeros(runner.stages[0].inputs[0].shape, np.uint8)
        image_s = sum(by_rows[max(by_rows)] / max(by_rows) for by_rows in stage_seconds) / runner.n_lanes
        single_image_s = sum(by_rows[min(by_rows)] for by_rows in stage_seconds)
        n_full, n_single = (min(max(int(HOST_S / s), FEWEST_IMAGES), MOST_IMAGES) for s in (image_s, single_image_s))
        at_once = min(4 * runner.n_lanes * runner.max_rows, n_full)

        def serve(n_images: int, n_in_flight: int) -> tuple[float, float]:
            """CPU seconds per image, and batches per image."""
            room, done = SimpleQueue[int](), Event()
            n_left, n_room = n_images, n_in_flight

            def take(outcomes: list[tuple[Any, Told]]) -> None:
                nonlocal n_left
                n_left -= len(outcomes)
                room.put(len(outcomes))
                if not n_left:
                    done.set()

            n_before, host_before_s = counter.n_batches, engine.ask(time.thread_time).result() + time.thread_time()
            for _ in range(n_images):
                n_room = n_room or room.get()
                n_room -= 1
                engine.submit_to(take, None, image, flush=not n_room)
            engine.flush()
            done.wait()
            host_s = engine.ask(time.thread_time).result() + time.thread_time() - host_before_s
            return host_s / n_images, (counter.n_batches - n_before) / n_images

        serve(n_full, at_once)  # lets steering settle
        runs = [(serve(n_full, at_once), serve(n_single, 1)) for _ in range(3)]
    finally:
        engine.drain(10.0)
    (full_s, full_batches), (single_s, single_batches) = (
        [median(run[i][k] for run in runs) for k in range(2)] for i in range(2)
    )
    # If no two images ever share a batch, work per batch and per image cannot be separated: all counts per image.
    batch_s = max(0.0, (single_s - full_s) / (single_batches - full_batches)) if runner.max_rows > 1 else 0.0
    return max(0.0, full_s - batch_s * full_batches), batch_s
