"""A plan, and its output as text and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from service.plan.planning import Outcome, Replicas, least_replicas, plain
from service.plan.simulation import Setup
from service.plan.stage_times import StageTimes

NEAR_CAPACITY = 0.95  # load beyond which latency depends on how long the load lasts


@dataclass(frozen=True, slots=True)
class Plan:
    """The question (network, setup, rate), and the simulated results."""

    network: str
    full_mflops: float
    setup: Setup
    times: StageTimes
    rate_per_s: float  # over all replicas
    n_replicas: int
    at_once: int  # images that arrive at one moment
    seed: int
    saturated: Outcome  # one replica at saturation
    at_rate: Outcome | None  # one replica at its share of the rate; None if that is beyond its capacity
    for_latency: Replicas | None

    @property
    def replica_rate_per_s(self) -> float:
        return self.rate_per_s / self.n_replicas

    @property
    def load(self) -> float:
        """Rate over capacity."""
        return self.replica_rate_per_s / self.saturated.images_per_s

    @property
    def is_overloaded(self) -> bool:
        return self.at_rate is None

    def document(self) -> dict[str, Any]:
        """The plan as plain values for JSON; names carry units."""
        return {
            "network": self.network,
            "setup": asdict(self.setup),
            "full_mflops": self.full_mflops,
            "stage_times": {"machine": self.times.machine, "network": self.times.network},
            "rate_per_s": self.rate_per_s,
            "replicas": self.n_replicas,
            "images_at_once": self.at_once,
            "seed": self.seed,
            "load": self.load,
            "overloaded": self.is_overloaded,
            "saturated_replica": plain(self.saturated),
            "replica_at_rate": None if self.at_rate is None else plain(self.at_rate),
            "least_replicas": least_replicas(self.rate_per_s, self.saturated.images_per_s),
            "replicas_for_latency": None if self.for_latency is None else asdict(self.for_latency),
        }

    def lines(self) -> Iterator[str]:
        """The plan as text."""
        setup, top = self.setup, self.saturated
        capacity = top.images_per_s
        share = setup.budget_mflops / self.full_mflops
        yield (
            f"{self.network}: a budget of {setup.budget_mflops:.4g} of {self.full_mflops:.4g} MFLOPs per image "
            f"({share:.0%}), {_count(setup.n_lanes, 'lane')}, batches of up to {setup.max_rows}, policy {setup.policy}"
        )
        yield f"times of {self.times.network} on {self.times.machine}; {self._host()}"
        yield ""
        yield _line(
            "one replica can do", f"{capacity:,.0f} images/s; {self.n_replicas}: {capacity * self.n_replicas:,.0f}"
        )
        bursts = f" in bursts of {self.at_once}" if self.at_once > 1 else ""
        yield _line(
            "requested",
            f"{self.rate_per_s:,.0f} images/s{bursts}: {self.replica_rate_per_s:,.0f} per replica, "
            f"{self.load:.0%} of what it can do",
        )
        if self.at_rate is None:
            yield from self._overload()
        else:
            yield from self._expected(self.at_rate)
        yield from self._replicas()

    def _host(self) -> str:
        host_us = self.setup.http_image_s * 1e6
        return (
            f"{host_us:.0f} us per image for HTTP and decoding" if host_us else "without HTTP and decoding (--host-us)"
        )

    def _overload(self) -> Iterator[str]:
        too_many = self.replica_rate_per_s - self.saturated.images_per_s
        yield ""
        yield (
            f"OVERLOAD: every replica's queue grows by {too_many:,.0f} images per second, until it refuses (429). "
            "There is no steady latency."
        )
        yield "Lower the budget, the rate, or add replicas. What a saturated replica does meanwhile:"
        yield from self._outcome(self.saturated)

    def _expected(self, outcome: Outcome) -> Iterator[str]:
        note = ""
        if self.load > NEAR_CAPACITY:
            note = "  (near capacity: rises the longer the load lasts)"
        yield _line(
            "latency", f"p50 {outcome.p50_ms:.1f} ms, p95 {outcome.p95_ms:.1f} ms, p99 {outcome.p99_ms:.1f} ms{note}"
        )
        yield from self._outcome(outcome)

    def _outcome(self, outcome: Outcome) -> Iterator[str]:
        budget = self.setup.budget_mflops
        yield _line("rows per batch, by stage", "  ".join(f"{rows:.1f}" for rows in outcome.batch_rows))
        yield _line("exit shares, %", "  ".join(f"{100 * share:.1f}" for share in outcome.shares))
        yield _line(
            "spent",
            f"{outcome.mean_mflops:.2f} MFLOPs per image, {_relation(outcome.mean_mflops / budget)} the budget; "
            f"the costliest 1,000 in a row {outcome.worst_mflops:.2f}",
        )
        if outcome.cut_short > 0:
            yield _line("cut short by the ledger", f"{outcome.cut_short:.1%} of the images")
        yield _line("expected accuracy", f"{outcome.accuracy:.1%}, on held-out images")

    def _replicas(self) -> Iterator[str]:
        least = least_replicas(self.rate_per_s, self.saturated.images_per_s)
        yield _line("replicas to keep up", f"{least}")
        found = self.for_latency
        if found is None:
            return
        what = f"replicas for p99 <= {found.target_p99_ms:g} ms"
        if found.needed is None:
            yield _line(what, f"no number is enough: an idle replica's p99 is {found.p99_ms:.1f} ms")
        else:
            yield _line(what, f"{found.needed} (p99 {found.p99_ms:.1f} ms)")


def _line(name: str, text: str) -> str:
    return f"{name:<27} {text}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _relation(ratio: float) -> str:
    return f"{abs(ratio - 1):.1%} {'over' if ratio > 1 else 'under'}"
