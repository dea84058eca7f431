"""What Prometheus reads. Counts and gauges are taken from the engine's own structures at the moment of the scrape, so
that they cannot drift from the truth; only what has a distribution is observed as it happens.

No label comes from a client: exits, stages, reasons and outcomes are all known at the start, and so every labelled
child is made once, before the first request.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from models.manifest import Manifest
from service.budget import BudgetState, Reason
from service.observer import EngineStats
from service.rows import Answer

Outcome = Literal["answered", "invalid", "overloaded", "unavailable", "abandoned", "failed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
REASONS: tuple[Reason, ...] = get_args(Reason)

disable_created_metrics()  # else a second series for each of ours

# 15 bounds and +Inf: no histogram has more than 16 buckets.
MAX_BOUNDS = 15
SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
DECODE_SECONDS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)


class Metrics:
    """The registry, and what is observed as it happens.

    `batch_ran` and `answered` are called on the engine's thread (it is the engine's `Observer`), the rest on the
    event loop.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.registry = CollectorRegistry()
        exits = range(1, len(manifest.exits) + 1)
        self._ready = Gauge("exitserve_ready", "1 while images are taken, 0 before and after", registry=self.registry)
        requests = Counter(
            "exitserve_requests", "Classification requests, by how they ended", ["outcome"], registry=self.registry
        )
        self._requests = {outcome: requests.labels(outcome) for outcome in OUTCOMES}
        self._request_mflops = Histogram(
            "exitserve_request_mflops",
            "Millions of multiply-adds an answer was charged",
            buckets=_cost_bounds([exit_.executed_mflops for exit_ in manifest.exits]),
            registry=self.registry,
        )
        self._request_seconds = self._by(
            "exit", exits, "exitserve_request_seconds", "From a request's whole body to its answer, by exit", SECONDS
        )
        self._decode_seconds = Histogram(
            "exitserve_decode_seconds", "Decoding an image", buckets=DECODE_SECONDS, registry=self.registry
        )
        self._batch_rows = self._by("stage", exits, "exitserve_batch_rows", "Images that ran a stage together", ROWS)
        self._queue_seconds = self._by(
            "stage", exits, "exitserve_queue_seconds", "An image's wait before a stage", SECONDS
        )
        self._stage_seconds = self._by(
            "stage", exits, "exitserve_stage_seconds", "A batch's run through a stage", SECONDS
        )

    def _by(
        self, label: str, values: Iterable[int], name: str, text: str, bounds: Sequence[float]
    ) -> dict[int, Histogram]:
        family = Histogram(name, text, [label], buckets=bounds, registry=self.registry)
        return {value: family.labels(str(value)) for value in values}

    def watch_readiness(self, is_ready: Callable[[], bool]) -> None:
        """Ask `is_ready` at every scrape from now on."""
        self._ready.set_function(lambda: float(is_ready()))

    def watch(self, stats: Callable[[], EngineStats], budget: Callable[[], BudgetState], manifest: Manifest) -> None:
        """Read the engine's counts and the budget at every scrape from now on."""
        self.registry.register(_EngineCollector(stats, budget, manifest))

    def count(self, outcome: Outcome) -> None:
        self._requests[outcome].inc()

    def decoded(self, seconds: float) -> None:
        self._decode_seconds.observe(seconds)

    def responded(self, exit_number: int, seconds: float) -> None:
        self._request_seconds[exit_number].observe(seconds)

    def batch_ran(self, stage: int, seconds: float, queue_seconds: Sequence[float]) -> None:
        self._batch_rows[stage].observe(len(queue_seconds))
        self._stage_seconds[stage].observe(seconds)
        waits = self._queue_seconds[stage]
        for wait in queue_seconds:
            waits.observe(wait)

    def answered(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._request_mflops.observe(answer.mflops)

    def exposition(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type. Waits for the engine: not for the event loop."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4


def _cost_bounds(costs_mflops: Sequence[float]) -> list[float]:
    """Bounds that tell the exits apart, as every answer costs what its exit does; of many exits, every other one."""
    step = -(-len(costs_mflops) // MAX_BOUNDS)
    kept = costs_mflops[::-1][::step][::-1]
    return [float(f"{cost * 1.0005:.4g}") for cost in kept]


class _EngineCollector(Collector):
    """Reads the engine when it is asked, never in between."""

    def __init__(self, stats: Callable[[], EngineStats], budget: Callable[[], BudgetState], manifest: Manifest) -> None:
        self._stats = stats
        self._budget = budget
        self._exits = range(1, len(manifest.exits) + 1)
        self._full_mflops = manifest.exits[-1].executed_mflops
        self._info = {"name": manifest.name, "version": manifest.version, "exits": str(len(manifest.exits))}

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
        ):
            family = CounterMetricFamily(f"exitserve_{name}", text)
            family.add_metric([], count)
            yield family
        for name, text, value in (
            ("budget_mflops", "The average that is kept, in millions of multiply-adds per image", budget.budget_mflops),
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
        yield self._by_number("queue_rows", "Images waiting before a stage", "stage", stats.queued_rows)
        info = InfoMetricFamily("exitserve_model", "The bundle that is served")
        info.add_metric([], self._info)
        yield info

    def _by_number(self, name: str, text: str, label: str, values: Sequence[float]) -> Metric:
        family = GaugeMetricFamily(f"exitserve_{name}", text, labels=[label])
        for number, value in enumerate(values, start=1):
            family.add_metric([str(number)], value)
        return family
