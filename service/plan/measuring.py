"""Measures on this machine what a simulation needs to know: stages with all lanes busy, and the host's share."""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import SimpleQueue
from statistics import median
from threading import Event, Semaphore
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.scores import Score
from service.assembly import default_burst_images
from service.budget import BudgetController
from service.engine import Engine
from service.lanes import Batch, BatchResult, Lanes
from service.observer import Observer
from service.plan.stage_times import StageTimes
from service.rows import Answer, Options, Request, Told
from service.runners.base import Block, RowState, StageOutput
from service.runners.onnx import OnnxRunner, default_lanes
from service.runners.providers import Device
from service.scheduler import Scheduler

LEAST_ROUNDS = 3
MOST_ROUNDS = 30
BATCHES_A_LANE = 3  # put at once, so that all lanes run for most of the time


def measure(
    bundle: Bundle,
    device: Device = "auto",
    n_lanes: int | None = None,
    max_rows: int = 32,
    limit_s: float = 3.0,
    tell: Callable[[str], object] = lambda text: None,
) -> StageTimes:
    """Measure a bundle's stages and the engine's own work; nothing else should run meanwhile.

    Args:
        bundle: as loaded.
        device, n_lanes, max_rows: as the server's settings.
        limit_s: for the stages; three rounds are made in any case.
        tell: told what is being measured.

    Raises:
        StageLoadError, RunnerError: the stages cannot be run.
    """
    runner = OnnxRunner(bundle, max_rows, n_lanes, device)
    tell(f"measuring {runner.n_stages} stages on {runner.n_lanes} lanes")
    with _running(runner, bundle.score()) as run:
        stages = _Stages(runner, run).measure(limit_s)
    tell("measuring the engine's own work")
    image_s, batch_s = _measure_host(bundle, runner, stages.seconds)
    manifest = bundle.manifest
    return StageTimes(
        network=f"{manifest.name} {manifest.version} in {bundle.precision}",
        machine=f"{platform.machine()}, {runner.provider}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        n_lanes=runner.n_lanes,
        n_cores=default_lanes(),
        lanes_take_cores=runner.provider == "CPUExecutionProvider",
        alone_speed=stages.alone_speed,
        stage_seconds=tuple(stages.seconds),
        copy_row_seconds=tuple(stages.copy_row_seconds),
        host_image_seconds=image_s,
        host_batch_seconds=batch_s,
    )


# --- stages ---------------------------------------------------------------------------------------------------------

Run = Callable[[Sequence[Batch]], None]


@contextmanager
def _running(runner: OnnxRunner, score: Score) -> Iterator[Run]:
    """Lanes as the engine has them, and a function that runs batches on them and waits for all."""
    done: SimpleQueue[Batch] = SimpleQueue()
    lanes = Lanes(runner, score, done.put)
    lanes.start()

    def run(batches: Sequence[Batch]) -> None:
        for batch in batches:
            lanes.put(batch)
        for _ in batches:
            error = done.get().error
            if error is not None:
                raise error

    try:
        yield run
    finally:
        lanes.stop(timeout_s=1.0)


class _Stages:
    """Rounds over all batch sizes and stages, so that what disturbs the machine for a while disturbs all alike."""

    def __init__(self, runner: OnnxRunner, run: Run) -> None:
        self._runner, self._run = runner, run
        n_stages, max_rows = runner.n_stages, runner.max_rows
        self._sizes = sorted({min(2**k, max_rows) for k in range(max_rows.bit_length() + 1)})
        self._busy: list[dict[int, list[float]]] = [{n: [] for n in self._sizes} for _ in range(n_stages)]
        self._alone: list[list[float]] = [[] for _ in range(n_stages)]  # by stage, at the largest size
        self._beside: list[list[float]] = [[] for _ in range(n_stages)]  # the same while all lanes run
        self._copied: list[list[float]] = [[] for _ in range(n_stages)]  # what copying adds, a row
        shape = (max_rows, *runner.stages[0].inputs[0].shape)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        self._first = [runner.first_state(image) for image in images]

    @property
    def seconds(self) -> list[dict[int, float]]:
        return [{n: median(times) for n, times in by_rows.items()} for by_rows in self._busy]

    @property
    def alone_speed(self) -> float:
        if self._runner.n_lanes == 1:
            return 1.0
        beside, alone = (sum(median(times) for times in each) for each in (self._beside, self._alone))
        return max(1.0, beside / alone)

    @property
    def copy_row_seconds(self) -> list[float]:
        return [median(times) if times else 0.0 for times in self._copied]

    def measure(self, limit_s: float) -> "_Stages":
        self._round(keep=False)  # first runs take longer
        started = time.perf_counter()
        for n_done in range(1, MOST_ROUNDS + 1):
            self._round(keep=True)
            spent_s = time.perf_counter() - started
            if n_done >= LEAST_ROUNDS and spent_s * (n_done + 1) / n_done > limit_s:
                break
        return self

    def _round(self, keep: bool) -> None:
        largest = self._sizes[-1]
        for n_rows in self._sizes:
            states: Sequence[RowState] = self._first[:n_rows]
            for stage in range(self._runner.n_stages):
                batches = self._batches(stage, states, BATCHES_A_LANE * self._runner.n_lanes)
                times = [batch.ended_s - batch.started_s for batch in batches]
                if keep:
                    self._busy[stage][n_rows] += times
                if keep and n_rows == largest:
                    [alone] = self._batches(stage, states, 1)
                    self._alone[stage].append(alone.ended_s - alone.started_s)
                    self._beside[stage].append(median(times))
                    if stage and n_rows > 1:
                        self._measure_copies(stage, states)
                block = _result(batches[-1]).block
                states = [RowState(block, i) for i in range(n_rows)]

    def _measure_copies(self, stage: int, states: Sequence[RowState]) -> None:
        apart = states[::2][: len(states) // 2]
        for batch in self._batches(stage, apart, self._runner.n_lanes):
            self._copied[stage].append(_result(batch).copy_s / len(apart))

    def _batches(self, stage: int, states: Sequence[RowState], n_batches: int) -> list[Batch]:
        rows = [Request(None, _nobody, Options(), state) for state in states]
        batches = [Batch(stage, rows) for _ in range(n_batches)]
        self._run(batches)
        return batches


def _result(batch: Batch) -> BatchResult:
    if batch.result is None:
        raise RuntimeError("a batch without error has no result. This is a bug.")
    return batch.result


def _nobody(told: list[tuple[Any, Told]]) -> None:
    pass


# --- the engine around stages that take no time ---------------------------------------------------------------------

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


def _measure_host(
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
