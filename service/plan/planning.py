"""Simulates one replica at a rate and at saturation, and finds how many replicas a rate needs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.budget.ledger import ROLLING_ANSWERS
from service.budget.steering import MEGA
from service.plan.arrivals import poisson
from service.plan.simulation import Network, Record, Setup, Simulation
from service.plan.stage_times import StageTimes

SETTLING_IMAGES = 2_000  # not counted: steering settles meanwhile
SATURATED_IMAGES = 4_000
SEARCH_IMAGES = 6_000
IDLE_SHARE = 0.02  # of capacity: with so little load, further replicas do not lower the latency


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of a stream of images on one replica, after settling. Latencies: from arrival to answer."""

    images: int
    images_per_s: float  # answered
    p50_ms: float
    p95_ms: float
    p99_ms: float
    batch_rows: tuple[float, ...]  # mean, by stage
    mean_mflops: float
    worst_mflops: float  # highest mean of 1,000 consecutive answers; of all answers if there are fewer
    shares: tuple[float, ...]  # of the images, by exit
    cut_short: float  # share of the images that the ledger ended
    accuracy: float  # share of images whose answer, at the exit taken, is right
    latencies_ms: NDArray[np.float64]


def observe(network: Network, record: Record, n_settling: int) -> Outcome:
    """Summarise a record, without the first `n_settling` answers."""
    exits = np.array(record.exit[n_settling:])
    answered_s = np.array(record.answered_s[n_settling:])
    latencies_ms = 1e3 * (answered_s - np.array(record.came_s[n_settling:]))
    spent = np.array(record.spent[n_settling:]) / MEGA
    sums = np.concatenate([[0.0], np.cumsum(spent)])
    window = min(ROLLING_ANSWERS, len(spent))
    before_s = record.answered_s[n_settling - 1] if n_settling else 0.0
    p50, p95, p99 = np.percentile(latencies_ms, [50, 95, 99]).tolist()
    n_exits = len(network.costs_mflops)
    return Outcome(
        images=len(exits),
        images_per_s=len(exits) / (answered_s[-1] - before_s),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        batch_rows=tuple(sum(rows) / len(rows) if rows else 0.0 for rows in record.batch_rows),
        mean_mflops=float(spent.mean()),
        worst_mflops=float((sums[window:] - sums[:-window]).max() / window),
        shares=tuple((np.bincount(exits - 1, minlength=n_exits) / len(exits)).tolist()),
        cut_short=record.reason[n_settling:].count("budget") / len(exits),
        accuracy=float(network.correct[record.row[n_settling:], exits - 1].mean()),
        latencies_ms=latencies_ms,
    )


@dataclass(frozen=True, slots=True)
class Planner:
    """Runs simulations of one replica: the same network, times and settings at different rates."""

    network: Network
    times: StageTimes
    setup: Setup
    seed: int = 0
    at_once: int = 1  # images that arrive at one moment

    def saturated(self) -> Outcome:
        """Simulate a replica's maximum throughput: always enough images in flight to fill every batch."""
        n_in_flight = 4 * self.setup.n_lanes * self.setup.max_rows
        n_settling = max(SETTLING_IMAGES, 2 * n_in_flight)
        record = self._simulation().saturate(n_settling + max(SATURATED_IMAGES, 2 * n_in_flight), n_in_flight)
        return observe(self.network, record, n_settling)

    def at(self, rate_per_s: float, n_images: int) -> Outcome:
        """Simulate open-loop arrivals at a mean rate, which must be below capacity."""
        arrivals = poisson(rate_per_s, SETTLING_IMAGES + n_images, self.seed, self.at_once)
        return observe(self.network, self._simulation().run(arrivals.tolist()), SETTLING_IMAGES)

    def replicas_for(self, rate_per_s: float, p99_ms: float, capacity_per_s: float) -> "Replicas":
        """Find the fewest replicas that, sharing a rate evenly, keep the 99th percentile of latency."""

        @cache
        def p99_of(n_replicas: int) -> float:
            return self.at(rate_per_s / n_replicas, SEARCH_IMAGES).p99_ms

        fewest = least_replicas(rate_per_s, capacity_per_s)
        if p99_of(fewest) <= p99_ms:
            return Replicas(p99_ms, fewest, p99_of(fewest))
        most = max(fewest + 1, ceil(rate_per_s / (IDLE_SHARE * capacity_per_s)))
        enough = first(lambda n: p99_of(n) <= p99_ms, fewest, most)
        return Replicas(p99_ms, enough, p99_of(most if enough is None else enough))

    def _simulation(self) -> Simulation:
        return Simulation(self.network, self.times, self.setup, self.seed)


@dataclass(frozen=True, slots=True)
class Replicas:
    """Replicas for a latency target; `needed` is None if even idle replicas miss it."""

    target_p99_ms: float
    needed: int | None
    p99_ms: float  # with `needed` replicas; of nearly idle ones if the target cannot be met


def least_replicas(rate_per_s: float, capacity_per_s: float) -> int:
    """The fewest replicas whose capacity exceeds the rate."""
    return int(rate_per_s / capacity_per_s) + 1


def first(holds: Callable[[int], bool], too_few: int, most: int) -> int | None:
    """The least number above `too_few`, up to `most`, from which on `holds` is true; None if there is none.

    Searches by doubling steps, then by bisection: the answer is usually near the beginning.
    """
    step = 1
    while not holds(enough := min(too_few + step, most)):
        if enough == most:
            return None
        too_few, step = enough, 2 * step
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if holds(middle):
            enough = middle
        else:
            too_few = middle
    return enough


def plain(outcome: Outcome) -> dict[str, Any]:
    """Plain values for JSON, without `latencies_ms`."""
    names = [name for name in Outcome.__slots__ if name != "latencies_ms"]
    return {name: getattr(outcome, name) for name in names}
