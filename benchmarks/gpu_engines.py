"""Engines of the GPU benchmark: images/s at every budget, and one image alone."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.closed_loop import Load, Round, ideal_rate
from benchmarks.gpu_cases import Case, Plan
from service.rows import Answer, Options
from service.runners.slotted import SlotRunner

FRACTIONS = (0.25, 0.4, 0.6, 1.0)  # budgets, of the full network's cost


class BusyTime:
    """An observer that adds up what the batches of an engine take on the device, by the runner's own times."""

    def __init__(self, seconds: dict[tuple[int, int], float], buckets: Sequence[int]) -> None:
        self._seconds, self._buckets = seconds, buckets
        self.busy_s = 0.0
        self.batches = 0

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        bucket = next(size for size in self._buckets if size >= len(queue_seconds))
        self.busy_s += self._seconds[stage, bucket]
        self.batches += 1

    def answered(self, answers: Sequence[Answer]) -> None:
        pass


def measure_engine(
    case: Case, runner: SlotRunner[Any], policy: str, plan: Plan, device_s: dict[tuple[int, int], float]
) -> list[dict[str, Any]]:
    """Images/s of an engine at every budget, beside the ideal of its stage times at the exits that were taken."""
    busy = BusyTime(device_s, runner.buckets)
    engine = case.engine(runner, policy, busy)
    row_s = [device_s[stage + 1, runner.max_rows] / runner.max_rows for stage in range(runner.n_stages)]
    measured = []
    try:
        engine.start()
        for fraction in FRACTIONS:
            engine.set_budget(fraction * case.costs_mflops[-1])
            settled = Load(engine, case.images, plan.in_flight).run()
            n_images = max(len(case.images), int(settled.images_per_s * plan.seconds))
            busy.busy_s, busy.batches = 0.0, 0
            images = [case.images[i % len(case.images)] for i in range(n_images)]
            found: Round = Load(engine, images, plan.in_flight).run()
            wall_s, ideal = n_images / found.images_per_s, ideal_rate(row_s, found.shares, 1)
            measured.append(
                {
                    "budget": fraction,
                    "cost": found.mean_mflops / case.costs_mflops[-1],
                    "images_per_s": found.images_per_s,
                    "ideal_images_per_s": ideal,
                    "share_of_ideal": found.images_per_s / ideal,
                    "rows_a_batch": found.mean_batch_rows,
                    "device_idle": max(0.0, 1 - busy.busy_s / wall_s),  # lost to launches, waiting and the engine
                    "batches": busy.batches,
                    "median_ms": found.median_ms,
                    "shares": found.shares,
                }
            )
    finally:
        engine.drain(60)
    return measured


def measure_alone(case: Case, runner: SlotRunner[Any], plan: Plan) -> dict[str, float]:
    """Milliseconds of an image that has the engine to itself: at 40 % budget, and through the whole network."""
    engine, told = case.engine(runner, "default"), {}
    engine.start()
    engine.set_budget(0.4 * case.costs_mflops[-1])
    for what, options in (("at 40 %", Options()), ("whole network", Options(exit=runner.n_stages))):
        milliseconds = []
        for i in range(plan.n_alone):
            started = time.perf_counter()
            engine.submit(case.images[i % len(case.images)], options).result()
            milliseconds.append(1e3 * (time.perf_counter() - started))
        told[f"{what}, p50"], told[f"{what}, p90"] = np.percentile(milliseconds, [50, 90]).tolist()
    engine.drain(60)
    return told
