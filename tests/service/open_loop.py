"""Open-loop traffic under a virtual clock: the real admission, scheduler, budget and latency control."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, nan

import numpy as np

from models.frontier import Frontier
from service.budget.controller import BudgetController
from service.budget.degrade import Degrade
from service.budget.ledger import Account
from service.engine.admission import Admission
from service.engine.costs import CostTable
from service.engine.pace import Pace
from service.engine.rows import ENDED, Options, Request
from service.engine.scheduler import Scheduler
from service.errors import EngineOverloaded
from tests.service.simulation import COSTS_MFLOPS, Image, population

N_EXITS = len(COSTS_MFLOPS)
BATCH_S = 3e-4
PLAIN = Options()
NO_ACCOUNT = Account(0)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One image and its outcome."""

    came_s: float
    took_s: float  # NaN if refused
    right: bool
    spent: int
    allowance: int
    working_mflops: float  # on arrival
    is_lowest: bool  # whether the working budget was the lowest on arrival


@dataclass
class Record:
    arrivals: list[Arrival] = field(default_factory=list)  # in order of answer or refusal
    n_images: int = 0

    def between(self, from_s: float, to_s: float) -> "Record":
        return Record([arrival for arrival in self.arrivals if from_s <= arrival.came_s < to_s], self.n_images)

    @property
    def answered(self) -> list[Arrival]:
        return [arrival for arrival in self.arrivals if arrival.took_s == arrival.took_s]

    @property
    def refused(self) -> list[Arrival]:
        return [arrival for arrival in self.arrivals if arrival.took_s != arrival.took_s]

    @property
    def p95_s(self) -> float:
        return float(np.percentile([arrival.took_s for arrival in self.answered], 95))

    @property
    def mean_mflops(self) -> float:
        return float(np.mean([arrival.spent for arrival in self.answered])) / 1e6

    @property
    def accuracy(self) -> float:
        return float(np.mean([arrival.right for arrival in self.answered]))

    @property
    def working_mflops(self) -> list[float]:
        return [arrival.working_mflops for arrival in self.arrivals]


@dataclass(slots=True, eq=False)
class _Row(Image):
    came_s: float
    working_mflops: float
    is_lowest: bool


def _tell_nobody(outcomes: object) -> None:
    """Sink of the requests, which only count for admission."""


def seconds_per_row(mflops_per_s: float) -> list[float]:
    """Seconds per row, by stage."""
    return [float(mflops) / mflops_per_s for mflops in np.diff([0.0, *COSTS_MFLOPS])]


def capacity(frontier: Frontier, n_lanes: int, mflops_per_s: float) -> float:
    """Images/s at the frontier's end, in large batches."""
    return n_lanes * mflops_per_s / frontier.cost[-1]


def simulate_open_loop(
    budget: BudgetController,
    degrade: Degrade,
    phases: Sequence[tuple[float, float]],
    *,
    seed: int = 0,
    n_lanes: int = 2,
    max_rows: int = 32,
    max_in_flight: int = 1_024,
    max_queue_s: float = 1.0,
    mflops_per_s: float = 13_000.0,
    batch_s: float = BATCH_S,
) -> Record:
    """Send Poisson traffic in phases of (seconds, images/s), and answer all images that are admitted.

    A batch takes `batch_s` and, for every row, the stage's cost at `mflops_per_s`. As in the engine, each lane gets its
    next batch ahead of time.
    """
    rng = np.random.default_rng(seed)
    came: list[float] = []
    began_s = 0.0
    for seconds, rate in phases:
        came += (began_s + np.sort(rng.random(rng.poisson(seconds * rate))) * seconds).tolist()
        began_s += seconds
    scores, right = (table.tolist() for table in population(len(came), seed + 1))
    row_s = seconds_per_row(mflops_per_s)
    costs = CostTable([{1: batch_s + seconds, max_rows: batch_s + seconds * max_rows} for seconds in row_s])
    scheduler: Scheduler[_Row] = Scheduler(N_EXITS, max_rows, 0.05, costs)
    pace = Pace(n_lanes, sum(row_s))
    ahead: list[tuple[int, list[_Row]]] = []
    running: list[tuple[float, int, int, list[_Row], float]] = []
    record = Record(n_images=len(came))
    admission = Admission(max_in_flight)
    admission.open()
    n_batches, n_came, now_s = 0, 0, 0.0

    def dispatch() -> None:
        nonlocal n_batches
        while True:
            while ahead and len(running) < n_lanes:
                stage, rows = ahead.pop(0)
                n_batches += 1
                done_s = now_s + batch_s + row_s[stage] * len(rows)
                heapq.heappush(running, (done_s, n_batches, stage, rows, now_s))
            if len(running) + len(ahead) >= 2 * n_lanes or (picked := scheduler.pick(now_s)) is None:
                return
            ahead.append(picked)

    while n_came < len(came) or running:
        if n_came < len(came) and came[n_came] <= (running[0][0] if running else inf):
            now_s, n, n_came = came[n_came], n_came, n_came + 1
            degrade.follow(now_s, admission.in_flight, pace.row_s)
            working, is_lowest = budget.working_mflops, budget.ledger.allowance == budget.costs[0]
            row = _Row(scores[n], right[n], NO_ACCOUNT, now_s, now_s, working, is_lowest)
            try:
                admission.enter(Request(None, _tell_nobody, PLAIN, ENDED))
            except EngineOverloaded:
                record.arrivals.append(Arrival(now_s, nan, False, 0, 0, working, is_lowest))
                continue
            admission.take()
            row.account = budget.admit(1)
            scheduler.add([row], 0, now_s)
            dispatch()
            continue
        now_s, _, stage, rows, started_s = heapq.heappop(running)
        budget.refresh()
        reasons = budget.decide([row.account for row in rows], stage + 1, [row.scores[stage] for row in rows])
        going_on = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
        if going_on:
            scheduler.add(going_on, stage + 1, now_s)
        left = [row for row, reason in zip(rows, reasons, strict=True) if reason is not None]
        for row in left:
            took_s, account = now_s - row.came_s, row.account
            degrade.took(took_s)
            record.arrivals.append(
                Arrival(
                    row.came_s,
                    took_s,
                    row.right[stage],
                    budget.costs[stage],
                    account.allowance,
                    row.working_mflops,
                    row.is_lowest,
                )
            )
        pace.ran(now_s - started_s, len(left))
        if left:
            room_rows = pace.room_rows(degrade.bearable_wait_s(max_queue_s), max_in_flight)
            admission.leave(len(left), room_rows, pace.row_s)
        degrade.follow(now_s, admission.in_flight, pace.row_s)
        dispatch()
    return record
