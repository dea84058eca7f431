"""Prometheus metrics. What the engine knows is read from its own structures at each scrape, so that the two cannot
differ. Only histograms and the outcomes of requests are counted as events happen.

No label value comes from a client: exits, stages, reasons and outcomes are known at start-up, so the number of time
series is fixed.
"""

import errno
import os
import resource
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
    """The registry, and the engine's `Observer`: `batch_ran` and `answered` are called on the engine's thread.

    `count`, `decoded` and `responded` are the methods of the first tally.

    Args:
        manifest: of the network.
        tallies: one per event loop that serves; by default a single new one.
    """

    def __init__(self, manifest: Manifest, tallies: Sequence[Tally] = ()) -> None:
        self.registry = CollectorRegistry()
        exits = range(1, len(manifest.exits) + 1)
        tallies = tallies or [Tally(len(exits))]
        self.count, self.decoded, self.responded = tallies[0].count, tallies[0].decoded, tallies[0].responded
        self.registry.register(_RequestCollector(tallies))
        self.registry.register(_ProcessCollector(registry=None))
        self._ready = Gauge("exitserve_ready", "1 while images are accepted, otherwise 0", registry=self.registry)
        costs = _cost_bounds([exit_.executed_mflops for exit_ in manifest.exits])
        self._request_mflops = _Observed("request_mflops", "Millions of multiply-adds charged for an answer", costs)
        self._batch_rows = _Observed("batch_rows", "Images that ran a stage together", ROWS, exits)
        self._queue_seconds = _Observed("queue_seconds", "An image's wait before a stage", SECONDS, exits)
        self._stage_seconds = _Observed("stage_seconds", "A batch's run through a stage", SECONDS, exits)
        for observed in (self._request_mflops, self._batch_rows, self._queue_seconds, self._stage_seconds):
            self.registry.register(observed)

    def watch(self, stats: Callable[[], EngineStats], budget: Callable[[], BudgetState], bundle: Bundle) -> None:
        """Add the metrics of the engine and its budget, read at every scrape."""
        self.registry.register(_EngineCollector(stats, budget, bundle))

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        self._batch_rows.observe((len(queue_seconds),), stage)
        self._stage_seconds.observe((seconds,), stage)
        self._queue_seconds.observe(queue_seconds, stage)

    def answered(self, answers: Sequence[Answer]) -> None:
        self._request_mflops.observe([answer.mflops for answer in answers])

    def exposition(self, is_ready: bool) -> tuple[bytes, str]:
        """Return the metrics as Prometheus text, and its content type. Blocks on the engine: not for the event loop."""
        self._ready.set(is_ready)
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4


def _cost_bounds(costs_mflops: Sequence[float]) -> list[float]:
    """One bound just above each exit's cost, the only costs that answers have; thinned to at most `MAX_BOUNDS`."""
    step = -(-len(costs_mflops) // MAX_BOUNDS)
    kept = costs_mflops[::-1][::step][::-1]
    return sorted({float(f"{cost * 1.0005:.4g}") for cost in kept})  # the set merges exits of nearly equal cost


class _Observed(Collector):
    """One histogram per stage, or a single one. Written by one thread, and cheaper than prometheus_client's own.

    Args:
        stages: stage numbers, from 1; empty: one histogram without a label.
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


class _ProcessCollector(ProcessCollector):
    """Reports that all files are open when there is none left to count them with: an alert depends on it."""

    def collect(self) -> Iterable[Metric]:
        metrics = list(super().collect())
        if not any(metric.name == "process_open_fds" for metric in metrics) and _is_out_of_files():
            n_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            for name, text in (("open", "Number of open"), ("max", "Maximum number of open")):
                metrics.append(GaugeMetricFamily(f"process_{name}_fds", f"{text} file descriptors.", value=n_files))
        return metrics


def _is_out_of_files() -> bool:
    """Whether this process has as many files open as it may."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno == errno.EMFILE
    return False


class _RequestCollector(Collector):
    """Sums the tallies at each scrape."""

    def __init__(self, tallies: Sequence[Tally]) -> None:
        self._tallies = tallies

    def collect(self) -> Iterable[Metric]:
        return families(self._tallies)


class _EngineCollector(Collector):
    """Reads the engine and its budget at each scrape."""

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
        """Empty, so that registering does not query the engine, which may not have been started."""
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
            ("failed_batches", "Batches that failed in a runner", stats.failed_batches),
            ("hung_batches", "Batches given up because they ran too long", stats.hung_batches),
            ("latency_limited_seconds", "Time a latency target has held the budget down", stats.latency_limited_s),
        ):
            family = CounterMetricFamily(f"exitserve_{name}", text)
            family.add_metric([], count)
            yield family
        latency = budget.latency
        target_s, p95_s = (None, None) if latency is None else (latency.target_s, latency.p95_s)
        is_limited = latency is not None and latency.limited_s is not None
        is_lowest = latency is not None and latency.is_lowest
        for name, text, value in (
            ("budget_mflops", "The budget as set, in millions of multiply-adds per image", budget.budget_mflops),
            ("working_mflops", "The working budget: lower while a latency target holds it down", budget.working_mflops),
            ("latency_target_seconds", "Time within which to answer 95 % of images; NaN without a target", target_s),
            ("latency_p95_seconds", "95th percentile of answer times in the last second", p95_s),
            ("latency_limited", "1 while a latency target holds the budget down", is_limited),
            ("latency_at_lowest", "1 while the budget can be held down no further", is_lowest),
            ("full_mflops", "Cost of the whole network, in millions of multiply-adds", self._full_mflops),
            ("burst_images", "The most that answers may overspend, in budgets", budget.burst_images),
            ("rolling_mflops", "Mean cost of the last 1,000 answers", budget.rolling_mflops),
            ("expected_mflops", "Mean cost of held-out images at the current thresholds", budget.expected_mflops),
            ("expected_accuracy", "Accuracy on held-out images at the current thresholds", budget.expected_accuracy),
            ("saved_mflops", "What easy images have saved for hard ones", budget.settled_mflops),
            ("in_flight_rows", "Images in flight", stats.in_flight_rows),
            ("room_rows", "Images that may be in flight before more are refused", stats.room_rows),
            ("predicted_wait_seconds", "How long an image that arrives now would take", stats.predicted_wait_s),
        ):
            gauge = GaugeMetricFamily(f"exitserve_{name}", text)
            gauge.add_metric([], float("nan") if value is None else value)
            yield gauge
        yield self._by_number("threshold", "Score at which an image leaves, by exit", "exit", budget.thresholds)
        yield self._by_number(
            "expected_share",
            "Share of held-out images that leave at an exit, at the current thresholds",
            "exit",
            budget.expected_shares,
        )
        yield self._by_number("max_batch_rows", "Most images in one batch", "stage", stats.max_batch_rows)
        yield self._by_number("queue_rows", "Images waiting before a stage", "stage", stats.queued_rows)
        info = InfoMetricFamily("exitserve_model", "The bundle that is served")
        info.add_metric([], self._info)
        yield info

    def _by_number(self, name: str, text: str, label: str, values: Sequence[float]) -> Metric:
        family = GaugeMetricFamily(f"exitserve_{name}", text, labels=[label])
        for number, value in enumerate(values, start=1):
            family.add_metric([str(number)], value)
        return family
