"""Measures this machine for a simulation: stage times with all lanes busy, and the host's time."""

import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from queue import SimpleQueue
from statistics import median
from typing import Any, Self

import numpy as np

from models.bundle import Bundle
from models.scores import Score
from service.engine.lanes import Batch, BatchResult, ThreadLanes
from service.engine.rows import Options, Request, Told
from service.plan.host_times import measure_host
from service.plan.stage_times import StageTimes
from service.runners.blocks import RowState
from service.runners.onnx import OnnxRunner, default_lanes

LEAST_ROUNDS = 3
MOST_ROUNDS = 30
QUANTILES = 100
BATCHES_A_LANE = 3  # put at once, so that all lanes run most of the time


def measure(
    bundle: Bundle,
    n_lanes: int | None = None,
    max_rows: int = 32,
    budget_mflops: float | None = None,
    limit_s: float = 3.0,
    tell: Callable[[str], object] = lambda text: None,
) -> StageTimes:
    """Measure a bundle's stages on the CPU, and the engine's own work; nothing else should run meanwhile.

    At most one lane per core runs: further lanes would wait for a core. The simulation models that wait, so measured
    batch times must not include it.

    Args:
        bundle: as loaded.
        n_lanes, max_rows: as the server's settings.
        budget_mflops: per image; determines how often each stage runs. By default, every image runs every stage.
        limit_s: for the stages; at least three rounds are made.
        tell: called with what is being measured.

    Raises:
        StageLoadError, RunnerError: the stages cannot be run.
    """
    n_cores = default_lanes()
    runner = OnnxRunner(bundle, max_rows, min(n_lanes or n_cores, n_cores))
    tell(f"measuring {runner.n_stages} stages on {runner.n_lanes} lanes")
    with _LanesAtWork(runner, bundle.score()) as lanes:
        stages = _Stages(runner, lanes, _reaching(bundle, budget_mflops)).measure(limit_s)
    tell("measuring the engine's own work")
    image_s, batch_s = measure_host(bundle, runner, stages.seconds)
    manifest = bundle.manifest
    return StageTimes(
        network=f"{manifest.name} {manifest.version} in {bundle.precision}",
        machine=f"{platform.machine()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        n_lanes=n_lanes or n_cores,
        n_cores=n_cores,
        lanes_take_cores=True,
        alone_speed=stages.alone_speed,
        stage_seconds=tuple(stages.seconds),
        copy_row_seconds=tuple(stages.copy_row_seconds),
        host_image_seconds=image_s,
        host_batch_seconds=batch_s,
        wake_seconds=lanes.wake_quantiles_s,
        spread=stages.spread,
    )


def full_row_seconds(runner: OnnxRunner, bundle: Bundle, budget_mflops: float | None) -> list[float]:
    """Measure, as `measure` does but in half a second, only the seconds per row of a full batch at every stage."""
    with _LanesAtWork(runner, bundle.score()) as lanes:
        stages = _Stages(runner, lanes, _reaching(bundle, budget_mflops), [runner.max_rows]).measure(0.5)
    return [by_rows[runner.max_rows] / runner.max_rows for by_rows in stages.seconds]


def _reaching(bundle: Bundle, budget_mflops: float | None) -> list[float]:
    """The share of the images that run each stage at a budget."""
    frontier = bundle.frontier()
    if budget_mflops is None:
        return [1.0] * len(bundle.costs_mflops)
    shares = frontier.at_cost(budget_mflops).shares
    return [1.0 - sum(shares[:stage]) for stage in range(len(shares))]


class _LanesAtWork:
    """The engine's lanes; `run` waits for batches as the engine's thread does."""

    def __init__(self, runner: OnnxRunner, score: Score) -> None:
        self._done: SimpleQueue[Batch] = SimpleQueue()
        self._lanes, self._n_lanes = ThreadLanes(runner, score, self._done.put), runner.n_lanes
        self._wake_s: list[float] = []  # from a batch's end until the waiting thread has it, while all lanes run

    def __enter__(self) -> Self:
        self._lanes.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._lanes.stop(timeout_s=1.0)

    @property
    def wake_quantiles_s(self) -> tuple[float, ...]:
        """Quantiles of the wake-up delay. Its tail is the kernel's tick, for which the thread occasionally waits."""
        return _quantiles(self._wake_s)

    def run(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            self._lanes.put(batch)
        for n_left in range(len(batches), 0, -1):
            batch = self._done.get()
            now_s = time.perf_counter()
            if batch.error is not None:
                raise batch.error
            if n_left > self._n_lanes:
                self._wake_s.append(now_s - batch.ended_s)


class _Stages:
    """Times stages in rounds over all batch sizes, so that a temporary disturbance of the machine affects all equally.

    At each size the stages take turns on the lanes, each as often as in traffic. A stage that ran repeatedly would find
    its weights and rows in the nearest cache, and two lanes in the same memory-bound stage slow each other more than
    lanes in different stages.

    Args:
        reaching: share of the images that run each stage.
        sizes: of batches, the largest last; by default powers of two up to the runner's largest.
    """

    def __init__(
        self, runner: OnnxRunner, lanes: _LanesAtWork, reaching: Sequence[float], sizes: Sequence[int] = ()
    ) -> None:
        self._runner, self._lanes = runner, lanes
        turns = range(BATCHES_A_LANE * runner.n_lanes)
        self._turns = [
            stage
            for i in turns
            for stage, share in enumerate(reaching)
            if not i or int((i + 1) * share) > int(i * share)
        ]
        n_stages, max_rows = runner.n_stages, runner.max_rows
        self._sizes = sizes or sorted({min(2**k, max_rows) for k in range(max_rows.bit_length() + 1)})
        self._busy: list[dict[int, list[float]]] = [{n: [] for n in self._sizes} for _ in range(n_stages)]
        self._alone: list[list[float]] = [[] for _ in range(n_stages)]  # by stage, at the largest size
        self._copied: list[list[float]] = [[] for _ in range(n_stages)]  # seconds per copied row
        shape = (max_rows, *runner.stages[0].inputs[0].shape)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        self._states: list[Sequence[RowState]] = [[runner.first_state(image) for image in images]]  # before each stage
        for stage in range(n_stages - 1):
            [batch] = self._run([(stage, self._states[stage])])
            block = _result(batch).block
            self._states.append([RowState(block, i) for i in range(max_rows)])

    @property
    def seconds(self) -> list[dict[int, float]]:
        return [{n: median(times) for n, times in by_rows.items()} for by_rows in self._busy]

    @property
    def spread(self) -> tuple[float, ...]:
        """Quantiles of batch times over the medians of their stage and size: latency depends on more than the mean."""
        medians = self.seconds
        return _quantiles(
            [
                took_s / medians[stage][n_rows]
                for stage, by_rows in enumerate(self._busy)
                for n_rows, times in by_rows.items()
                for took_s in times
            ]
        )

    @property
    def alone_speed(self) -> float:
        if self._runner.n_lanes == 1:
            return 1.0
        beside_s = sum(by_rows[self._runner.max_rows] for by_rows in self.seconds)
        return max(1.0, beside_s / sum(median(times) for times in self._alone))

    @property
    def copy_row_seconds(self) -> list[float]:
        return [median(times) if times else 0.0 for times in self._copied]

    def measure(self, limit_s: float) -> Self:
        self._round(keep=False)  # first runs take longer
        started = time.perf_counter()
        for n_done in range(1, MOST_ROUNDS + 1):
            self._round(keep=True)
            spent_s = time.perf_counter() - started
            if n_done >= LEAST_ROUNDS and spent_s * (n_done + 1) / n_done > limit_s:
                break
        return self

    def _round(self, keep: bool) -> None:
        stages = range(self._runner.n_stages)
        for n_rows in self._sizes:
            for batch in self._run([(stage, self._states[stage][:n_rows]) for stage in self._turns]):
                if keep:
                    self._busy[batch.stage][n_rows].append(batch.ended_s - batch.started_s)
        if not keep:
            return
        for stage, states in enumerate(self._states):
            [alone] = self._run([(stage, states)])
            self._alone[stage].append(alone.ended_s - alone.started_s)
        if self._runner.max_rows > 1:
            apart = [(stage, self._states[stage][::2]) for stage in stages if stage]  # images are never copied
            for batch in self._run(apart * self._runner.n_lanes):
                self._copied[batch.stage].append(_result(batch).copy_s / len(batch.rows))

    def _run(self, batches: Sequence[tuple[int, Sequence[RowState]]]) -> list[Batch]:
        made = [Batch(stage, [Request(None, _nobody, Options(), s) for s in states]) for stage, states in batches]
        self._lanes.run(made)
        return made


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """Evenly spaced quantiles, whose mean is about the mean of the values."""
    return tuple(np.quantile(values, (np.arange(QUANTILES) + 0.5) / QUANTILES).tolist())


def _result(batch: Batch) -> BatchResult:
    if batch.result is None:
        raise RuntimeError("a batch without error has no result. This is a bug.")
    return batch.result


def _nobody(outcomes: list[tuple[Any, Told]]) -> None:
    pass
