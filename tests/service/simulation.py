"""Closed-loop traffic under a virtual clock: the real scheduler and budget, with rows of scores as images."""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.frontier import Frontier, build_frontier
from service.budget.controller import BudgetController
from service.budget.ledger import ROLLING_ANSWERS, Account
from service.engine.costs import CostTable
from service.engine.scheduler import Scheduler

COSTS_MFLOPS = (13.392, 22.937, 32.593, 42.123, 51.822, 60.308)  # of C-batch-4, as executed
FULL_MFLOPS = COSTS_MFLOPS[-1]


def population(n_images: int, seed: int, harder: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores [n, 6] and right answers [n, 6] of images whose difficulty is normal, `harder` deviations off the mean.

    The exits of one image agree much, later ones are surer and more often right, as those of real networks.
    """
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(harder, 1.0, n_images)
    noise = rng.normal(size=n_images)
    scores = np.empty((n_images, len(COSTS_MFLOPS)))
    for k in range(len(COSTS_MFLOPS)):
        noise = 0.8 * noise + 0.6 * rng.normal(size=n_images)
        scores[:, k] = 1.2 + 0.35 * k - 2.0 * difficulty + (1 - 0.05 * k) * noise
    right = rng.random(n_images)[:, None] < 1 / (1 + np.exp(0.2 - 0.8 * scores))
    return scores, right


def frontier() -> Frontier:
    return build_frontier(*population(5_000, seed=0), COSTS_MFLOPS)


@dataclass(slots=True, eq=False)
class Image:
    scores: list[float]
    right: list[bool]
    account: Account
    added_s: float


@dataclass(slots=True)
class Run:
    """Results, by answer."""

    spent: list[int] = field(default_factory=list)
    allowances: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    rolling: list[float] = field(
        default_factory=list
    )  # mean cost of the last 1,000 answers, divided by the current budget
    longest_wait_s: float = 0.0


def simulate(
    budget: BudgetController,
    images: tuple[NDArray[np.float64], NDArray[np.bool_]],
    n_clients: int = 32,
    n_lanes: int = 2,
    max_rows: int = 32,
    at_answer: Callable[[int], None] = lambda n_answers: None,
) -> Run:
    """Send all images, one at a time per client; a batch takes 0.3 ms, and 1 ms per 13 MFLOPs of each row."""
    n_exits = len(budget.costs)
    seconds_per_row = np.diff([0.0, *(cost / 1e6 for cost in budget.costs)]) / 13_000
    costs = CostTable([{1: 3e-4 + row_s, max_rows: 3e-4 + row_s * max_rows} for row_s in seconds_per_row.tolist()])
    scheduler: Scheduler[Image] = Scheduler(n_exits, max_rows, 0.05, costs)
    waiting: Iterator[tuple[list[float], list[bool]]] = zip(images[0].tolist(), images[1].tolist(), strict=True)
    running: list[tuple[float, int, int, list[Image]]] = []
    run, now_s, n_batches, latest = Run(), 0.0, 0, 0  # the latest answers' spending

    def arrive(n_images: int) -> None:
        for _, (scores, right) in zip(range(n_images), waiting, strict=False):
            scheduler.add([Image(scores, right, budget.admit(1), now_s)], 0, now_s)

    arrive(n_clients)
    while len(scheduler) or running:
        while len(running) < n_lanes and (picked := scheduler.pick(now_s)):
            stage, rows = picked
            for row in rows:
                run.longest_wait_s = max(run.longest_wait_s, now_s - row.added_s)
            n_batches += 1
            heapq.heappush(running, (now_s + 3e-4 + seconds_per_row[stage] * len(rows), n_batches, stage, rows))
        now_s, _, stage, rows = heapq.heappop(running)
        budget.refresh()
        reasons = budget.decide([row.account for row in rows], stage + 1, [row.scores[stage] for row in rows])
        left = [(row, reason) for row, reason in zip(rows, reasons, strict=True) if reason is not None]
        going_on = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        for row in going_on:
            row.added_s = now_s
        if going_on:
            scheduler.add(going_on, stage + 1, now_s)
        for row, reason in left:
            run.spent.append(budget.costs[stage])
            run.allowances.append(row.account.allowance)
            run.reasons.append(reason)
            run.right.append(row.right[stage])
            run.exits.append(stage)
            latest += run.spent[-1] - (run.spent[-ROLLING_ANSWERS - 1] if len(run.spent) > ROLLING_ANSWERS else 0)
            run.rolling.append(latest / min(len(run.spent), ROLLING_ANSWERS) / budget.ledger.allowance)
            at_answer(len(run.spent))
        arrive(len(left))
    return run


def worst_window(run: Run) -> int:
    """The most that any window of consecutive answers exceeded its allowances by (Kadane's algorithm)."""
    worst = current = 0
    for spent, allowance in zip(run.spent, run.allowances, strict=True):
        current = max(0, current + spent - allowance)
        worst = max(worst, current)
    return worst
