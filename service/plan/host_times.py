"""Measures the engine's own work: processor time of an image and of a batch, around stages that take no time."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from threading import Event, Semaphore
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from service.assembly import default_burst_images
from service.budget import BudgetController
from service.engine import Engine
from service.observer import Observer
from service.rows import Answer, Told
from service.runners.base import Block, RowState, StageOutput
from service.runners.onnx import OnnxRunner
from service.scheduler import Scheduler

HOST_IMAGES = 1_200
FEW_IMAGES = 200


@dataclass(slots=True)
class _Counter(Observer):
    """Counts what has run."""

    n_batches: int = 0

    def batch_ran(self, stage: int, seconds: float, wait_seconds: Sequence[float]) -> None:
        self.n_batches += 1

    def answered(self, answers: Sequence[Answer]) -> None:
        pass


class _NullRunner:
    """Stages that do nothing; all else is as it is served."""

    def __init__(self, runner: OnnxRunner, n_classes: int, stage_seconds: Sequence[Mapping[int, float]]) -> None:
        self.n_stages, self.n_lanes, self.max_rows = runner.n_stages, runner.n_lanes, runner.max_rows
        self._stage_seconds = stage_seconds
        self._logits = np.zeros((self.max_rows, n_classes), np.float32)

    def first_state(self, image: NDArray[np.uint8]) -> RowState:
        return RowState(Block({"images": image[None]}, 1), 0)

    def run(self, stage: int, rows: Sequence[RowState]) -> StageOutput:
        return StageOutput(self._logits[: len(rows)], Block({}, len(rows)), 0.0)

    def warm_up(self, limit_s: float = 1.0) -> Sequence[Mapping[int, float]]:
        return self._stage_seconds


class _DrawnScore:
    """Scores drawn from held-out images, exit by exit, so that images go about as deep as real ones."""

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
    """Processor time of an image, and of a batch: images come once one at a time, once so that batches are full."""
    counter = _Counter()
    scores = bundle.calibration.scores[bundle.manifest.score]
    costs_mflops = bundle.costs_mflops
    engine = Engine(
        _NullRunner(runner, len(bundle.manifest.class_names), stage_seconds),
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
        at_once = 4 * runner.n_lanes * runner.max_rows

        def serve(n_images: int, n_in_flight: int) -> tuple[float, float]:
            """Processor seconds and batches, each an image."""
            room, done = Semaphore(n_in_flight), Event()
            left = n_images

            def take(told: list[tuple[Any, Told]]) -> None:
                nonlocal left
                left -= len(told)
                room.release(len(told))
                if not left:
                    done.set()

            n_before, cpu_before = counter.n_batches, time.process_time()
            for _ in range(n_images):
                room.acquire()
                engine.submit_to(take, None, image)
            done.wait()
            return (time.process_time() - cpu_before) / n_images, (counter.n_batches - n_before) / n_images

        serve(HOST_IMAGES, at_once)  # steering settles
        runs = [(serve(HOST_IMAGES, at_once), serve(FEW_IMAGES, 1)) for _ in range(3)]
    finally:
        engine.drain(10.0)
    (full_s, full_batches), (single_s, single_batches) = (
        [median(run[i][k] for run in runs) for k in range(2)] for i in range(2)
    )
    batch_s = max(0.0, (single_s - full_s) / (single_batches - full_batches))
    return max(0.0, full_s - batch_s * full_batches), batch_s
