"""The engine in the GPU benchmark: images/s by budget, the latency of one image, and the network with exits off."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.closed_loop import Load, Round, ideal_rate
from benchmarks.gpu_cases import Case, Plan
from models.exits import SCORES
from models.scores import HeadScore, score_exits
from service.engine.rows import Answer, Options
from service.errors import EngineError
from service.runners.slotted import SlotRunner
from service.runners.torch_cuda.device import Copier, Device, Mark, Program, Stream
from service.runners.torch_cuda.kernels import Ways
from service.runners.torch_cuda.scoring import N_NUMBERS
from service.settled_memory import settle_memory

FRACTIONS = (0.25, 0.4, 0.6, 1.0)  # budgets, of the full network's cost
ROUNDS = 3


class BusyTime:
    """An observer that adds up the device time of an engine's batches, from measured times by stage and bucket."""

    def __init__(self, seconds: dict[tuple[int, int], float], buckets: Sequence[int]) -> None:
        self._seconds, self._buckets = seconds, buckets
        self.busy_s = 0.0
        self.batches = 0

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        bucket = next(size for size in self._buckets if size >= len(queue_seconds))
        self.busy_s += self._seconds.get((stage, bucket), 0.0)
        self.batches += 1

    def answered(self, answers: Sequence[Answer]) -> None:
        pass


def measure_engine(
    case: Case,
    runner: SlotRunner[Any],
    policy: str,
    plan: Plan,
    device_s: dict[tuple[int, int], float],
    fractions: Sequence[float] = FRACTIONS,
) -> list[dict[str, Any]]:
    """Images/s of an engine at every budget, with the ideal by its stage times at the exits that were taken.

    Args:
        device_s: device times in seconds by (stage, rows), stages from 1; empty if unknown.
    """
    busy = BusyTime(device_s, runner.buckets)
    engine = case.engine(runner, policy, plan, busy)
    full = runner.max_rows
    row_s = [device_s[stage + 1, full] / full for stage in range(runner.n_stages)] if device_s else []
    measured = []
    try:
        engine.start()
        settle_memory(plan.in_flight)  # as the server does
        for fraction in fractions:
            engine.set_budget(fraction * case.costs_mflops[-1])
            settled = Load(engine, case.images, plan.in_flight).run()
            n_images = max(len(case.images), int(settled.images_per_s * plan.seconds))
            busy.busy_s, busy.batches, cpu_s = 0.0, 0, time.process_time()
            rounds: list[Round] = [Load(engine, case.images, plan.in_flight, n_images).run() for _ in range(ROUNDS)]
            cpu_s = time.process_time() - cpu_s
            wall_s = sum(n_images / found.images_per_s for found in rounds)
            shares = np.mean([found.shares for found in rounds], axis=0).tolist()
            rates = [found.images_per_s for found in rounds]
            ideal = ideal_rate(row_s, shares, 1) if row_s else None
            measured.append(
                {
                    "budget": fraction,
                    "cost": sum(found.mean_mflops for found in rounds) / ROUNDS / case.costs_mflops[-1],
                    "images_per_s": median(rates),
                    "lowest_and_highest": [min(rates), max(rates)],
                    "ideal_images_per_s": ideal,
                    "share_of_ideal": median(rates) / ideal if ideal else None,
                    "rows_a_batch": sum(found.mean_batch_rows for found in rounds) / ROUNDS,
                    # The time lost to launches, waits and the engine.
                    "device_idle": max(0.0, 1 - busy.busy_s / wall_s) if device_s else None,
                    "batches": busy.batches,
                    "median_ms": median(found.median_ms for found in rounds),
                    "host_us_an_image": 1e6 * cpu_s / ROUNDS / n_images,  # of all threads, with waits for the device
                    "shares": shares,
                }
            )
    finally:
        engine.drain(10)
    return measured


def measure_alone(case: Case, runner: SlotRunner[Any], plan: Plan) -> dict[str, float]:
    """Latency in ms of single images in an idle engine: at a 40 % budget, and through the whole network."""
    engine = case.engine(runner, "default", plan)
    percentiles_ms: dict[str, float] = {}
    try:
        engine.start()
        for what, fraction, options in (
            ("at 40 %", 0.4, Options()),
            ("whole network", 1.0, Options(exit=runner.n_stages)),  # a lower budget covers only its burst
        ):
            engine.set_budget(fraction * case.costs_mflops[-1])
            milliseconds = []
            for i in range(plan.n_alone):
                started = time.perf_counter()
                answer = engine.submit(case.images[i % len(case.images)], options).result(60)
                milliseconds.append(1e3 * (time.perf_counter() - started))
                if options.exit not in (None, answer.exit):
                    raise EngineError(f"an image left at exit {answer.exit}, but exit {options.exit} was requested")
            p50_ms, p90_ms = np.percentile(milliseconds, [50, 90]).tolist()
            percentiles_ms |= {f"{what}, p50": p50_ms, f"{what}, p90": p90_ms}
    finally:
        engine.drain(10)
    return percentiles_ms


class LastExit(nn.Module):
    """A network that returns only its last logits, so that it is cut into a single stage, one graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        logits: list[Tensor] = self.network(images)
        return logits[-1:]


def measure_whole(case: Case, plan: Plan, n_rows: int, ways: Ways | None = None) -> dict[str, Any]:
    """Images/s of the whole network as one graph, without exits or engine, in batches of `n_rows`: the baseline.

    Args:
        ways: which kernels replace torch's; by default, those of the engine.
    """
    runner = case.runner(plan, LastExit(case.network), full_only=True, max_rows=n_rows, ways=ways)
    rows = runner.first_states(case.images, [i % len(case.images) for i in range(n_rows)])
    for row in rows:
        row.keeps_picture = True  # so that every run copies it to the device

    def keep_running(until_s: float) -> int:
        """Run batches as the engine's lanes do, launching the next before waiting for one; returns how many."""
        n_batches, running = 0, runner.launch(0, rows)
        while time.perf_counter() < until_s:
            following = runner.launch(0, rows, running)
            running.collect()
            running, n_batches = following, n_batches + 1
        running.collect()
        return n_batches + 1

    rates = []
    with ThreadPoolExecutor(runner.n_lanes) as lanes:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            n_batches = sum(lanes.map(keep_running, [started + plan.seconds] * runner.n_lanes))
            rates.append(n_batches * n_rows / (time.perf_counter() - started))
    return {"rows": n_rows, "images_per_s": median(rates), "lowest_and_highest": [min(rates), max(rates)]}


class Idle:
    """A device whose programs do nothing, while copies and waits are real."""

    def __init__(self, device: Device) -> None:
        self.kind, self.pins, self._device = device.kind, device.pins, device

    def open_stream(self) -> Stream:
        return _IdleStream(self._device.open_stream())

    def release_memory(self) -> None:
        self._device.release_memory()

    def is_lost(self) -> bool:
        return self._device.is_lost()


class _IdleStream:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def use(self) -> AbstractContextManager[Any]:
        return self._stream.use()

    def prepare(self, program: Program) -> Program:
        return lambda: None

    def copier(self, target: Tensor, source: Tensor) -> Copier:
        return self._stream.copier(target, source)

    def mark(self) -> Mark:
        return self._stream.mark()

    def query(self) -> bool:
        return self._stream.query()

    def wait(self) -> None:
        self._stream.wait()


def idle_runner(case: Case, plan: Plan) -> SlotRunner[Any]:
    """A runner whose network takes no time and whose scores are drawn from those of the case."""
    runner = case.runner(plan, device=Idle(plan.device))
    scores = score_exits(HeadScore(SCORES[case.score]), case.logits)
    verdicts = np.zeros((plan.max_rows, N_NUMBERS))
    verdicts[:, 2] = np.random.default_rng(2).choice(scores.ravel(), plan.max_rows)
    with torch.inference_mode():
        for lane in runner.lanes:  # the same for all batches, as programs do not overwrite them
            lane.results.on_device[: verdicts.nbytes].copy_(torch.from_numpy(verdicts.view(np.uint8).ravel()))
    return runner


def measure_idle(case: Case, plan: Plan, runner: SlotRunner[Any] | None = None) -> list[dict[str, Any]]:
    """The engine with a network that takes no time: the limit set by its own threads, at a 40 % budget."""
    return measure_engine(case, runner or idle_runner(case, plan), "default", plan, {}, (0.4,))
