"""What Prometheus reads. Counts and gauges are taken from the engine's own structures at the moment of the scrape, so
that they cannot drift from the truth; only what has a distribution is observed as it happens.

No label comes from a client: exits, stages, reasons and outcomes are all known at the start, and so every labelled
child is made once, before the first request.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from models.bundle import Bundle
from models.manifest import Manifest
from service.budget.controller import Reason
from service.budget.state import BudgetState
from service.engine.observer import EngineStats
from service.engine.rows import Answer
from service.tally import SECONDS, Tally, add_histogram, families

REASONS: tuple[Reason, ...] = get_args(Reason)

MAX_BOUNDS = 15
ROWS = (1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024)


class Metrics:
    """The registry, and what is observed as it happens.

    `batch_ran` and `answered` are called on the engine's thread: it is the engine's `Observer`. `count`, `decoded` and
    `responded` are those of its tally.

    Args:
        manifest: of the network.
        tallies: of the event loops that serve; by default there is one, `count` and its like.
    """

    def __init__(self, manifest: Manifest, tallies: Sequence[Tally] = ()) -> None:
        self.registry = CollectorRegistry()
        exits = range(1, len(manifest.exits) + 1)
        tallies = tallies or [Tally(len(exits))]
        self.count, self.decoded, self.responded = tallies[0].count, tallies[0].decoded, tallies[0].responded
        self.registry.register(_RequestCollector(tallies))
        ProcessCollector(registry=self.registry)
        self._ready = Gauge("exitserve_ready", "1 while images are taken, 0 before and after", registry=self.registry)
        costs = _cost_bounds([exit_.executed_mflops for exit_ in manifest.exits])
        self._request_mflops = _Observed("request_mflops", "Millions of multiply-adds an answer was charged", costs)
        self._batch_rows = _Observed("batch_rows", "Images that ran a stage together", ROWS, exits)
        self._queue_seconds = _Observed("queue_seconds", "An image's wait before a stage", SECONDS, exits)
        self._stage_seconds = _Observed("stage_seconds", "A batch's run through a stage", SECONDS, exits)
        for observed in (self._request_mflops, self._batch_rows, self._queue_seconds, self._stage_seconds):
            self.registry.register(observed)

    def watch(self, stats: Callable[[], EngineStats], budget: Callable[[], BudgetState], bundle: Bundle) -> None:
        """Read the engine's counts and the budget at every scrape from now on."""
        self.registry.register(_EngineCollector(stats, budget, bundle))

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        self._batch_rows.observe((len(queue_seconds),), stage)
        self._stage_seconds.observe((seconds,), stage)
        self._queue_seconds.observe(queue_seconds, stage)

    def answered(self, answers: Sequence[Answer]) -> None:
        self._request_mflops.observe([answer.mflops for answer in answers])

    def exposition(self, is_ready: bool) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type. Waits for the engine: not for the event loop."""
        self._ready.set(is_ready)
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4


def _cost_bounds(costs_mflops: Sequence[float]) -> list[float]:
    """Bounds that tell the exits apart, as every answer costs what its exit does; of many exits, every other one."""
    step = -(-len(costs_mflops) // MAX_BOUNDS)
    kept = costs_mflops[::-1][::step][::-1]
    return sorted({float(f"{cost * 1.0005:.4g}") for cost in kept})  # those of exits as good as alike are the same


class _Observed(Collector):
    """A histogram for every stage, or one; written by one thread, and for less than prometheus_client's own take.

    Args:
        stages: from 1; none: one histogram without a label.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], stages: Iterable[int] = ()) -> None:
        self._name, self._text, self._bounds = f"exitserve_{name}", text, tuple(bounds)
        self._labels = ["stage"] if stages else []
        self._cells = {stage: [0.0] * (len(self._bounds) + 2) for stage in stages or (0,)}

    def observe(self, values: Iterable[float], stage: int = 0) -> None:
        cells, bounds = self._cells[stage], self._bounds
        for value in values:
            cells[bisect_left(bounds, value)] += 1.0
            cells[-1] += value

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for stage, cells in self._cells.items():
            add_histogram(family, [str(stage)] if self._labels else [], cells, 0, self._bounds)
        yield family


class _RequestCollector(Collector):
    """Adds the tallies up when it is asked."""

    def __init__(self, tallies: Sequence[Tally]) -> None:
        self._tallies = tallies

    def collect(self) -> Iterable[Metric]:
        return families(self._tallies)


class _EngineCollector(Collector):
    """Reads the engine when it is asked, never in between."""

    def __init__(self, stats: Callable[[], EngineStats], budget: Callable[[], BudgetState], bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._stats = stats
        self._budget = budget
        self._exits = range(1, len(manifest.exits) + 1)
        self._full_mflops = manifest.exits[-1].executed_mflops
        self._info = {
            "name": manifest.name,
            "version": manifest.version,
            "exits": str(len(manifest.exits)),
            "precision": bundle.precision,
        }

    def describe(self) -> Iterable[Metric]:
        """Empty, so that registering does not ask an engine that may not have been started."""
        return ()

    def collect(self) -> Iterable[Metric]:
        stats, budget = self._stats(), self._budget()
        exits = CounterMetricFamily("exitserve_exits", "Answers, by exit and reason", labels=["exit", "reason"])
        for number in self._exits:
            for reason in REASONS:
                exits.add_metric([str(number), reason], stats.exits.get((number, reason), 0))
        yield exits
        total = CounterMetricFamily("exitserve_mflops", "Millions of multiply-adds charged over all answers")
        total.add_metric([], budget.spent_answered_mflops)
        yield total
        for name, text, count in (
            ("failed_batches", "Batches that a runner failed on", stats.failed_batches),
            ("hung_batches", "Batches given up because they ran too long", stats.hung_batches),
            ("latency_limited_seconds", "Time worked below the budget for a latency target", stats.latency_limited_s),
        ):
            family = CounterMetricFamily(f"exitserve_{name}", text)
            family.add_metric([], count)
            yield family
        latency = budget.latency
        target_s, p95_s = (None, None) if latency is None else (latency.target_s, latency.p95_s)
        is_limited = latency is not None and latency.limited_s is not None
        is_lowest = latency is not None and latency.is_lowest
        for name, text, value in (
            ("budget_mflops", "The average that was set, in millions of multiply-adds per image", budget.budget_mflops),
            ("working_mflops", "The average that is kept now: less where latency needs it", budget.working_mflops),
            ("latency_target_seconds", "Time to answer 95 % in; NaN without a target", target_s),
            ("latency_p95_seconds", "95 % of the last second's answers took no longer", p95_s),
            ("latency_limited", "1 while a latency target holds the budget down", is_limited),
            ("latency_at_lowest", "1 while it can hold it down no further", is_lowest),
            ("full_mflops", "What the whole network costs, in millions of multiply-adds", self._full_mflops),
            ("burst_images", "Images' budgets that any window of answers may overspend", budget.burst_images),
            ("rolling_mflops", "What the last 1,000 answers cost on average", budget.rolling_mflops),
            ("expected_mflops", "What held-out images cost on average where steering stands", budget.expected_mflops),
            ("expected_accuracy", "Share of held-out images right where steering stands", budget.expected_accuracy),
            ("saved_mflops", "What easy images left over for hard ones", budget.settled_mflops),
            ("in_flight_rows", "Images in the engine", stats.in_flight_rows),
            ("room_rows", "Images that may be in the engine before more are refused", stats.room_rows),
            ("predicted_wait_seconds", "How long an image would take that came now", stats.predicted_wait_s),
        ):
            gauge = GaugeMetricFamily(f"exitserve_{name}", text)
            gauge.add_metric([], float("nan") if value is None else value)
            yield gauge
        yield self._by_number("threshold", "Score from which an image leaves, by exit", "exit", budget.thresholds)
        yield self._by_number(
            "expected_share",
            "Share of held-out images that leave at an exit where steering stands",
            "exit",
            budget.expected_shares,
        )
        yield self._by_number("max_batch_rows", "Largest batch that is tried", "stage", stats.max_batch_rows)
        yield self._by_number("queue_rows", "Images waiting before a stage", "stage", stats.queued_rows)
        info = InfoMetricFamily("exitserve_model", "The bundle that is served")
        info.add_metric([], self._info)
        yield info

    def _by_number(self, name: str, text: str, label: str, values: Sequence[float]) -> Metric:
        family = GaugeMetricFamily(f"exitserve_{name}", text, labels=[label])
        for number, value in enumerate(values, start=1):
            family.add_metric([str(number)], value)
        return family
