"""The result of a run of the load generator."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.arrivals import Times

STATUS_NAMES = {0: "connection ended", -1: "unanswered"}


@dataclass(frozen=True)
class Result:
    """All R requests of one run, in order of sending. Times are in seconds from the start."""

    intended_s: Times  # [R] when they were due to be sent
    sent_s: Times  # [R]
    done_s: Times  # [R] NaN without an answer
    statuses: NDArray[np.int16]  # [R] HTTP status; 0: the connection ended first, -1: no answer before the run ended
    image_index: NDArray[np.int64]  # [R] image sent
    bodies: list[bytes]  # [R] bodies of the answers
    seconds: float  # from the start until sending stopped; in an open loop until the last answer, if later
    client_cpu_s: float
    stopped_early: bool  # because too many were late, see `open_loop`

    @property
    def n_sent(self) -> int:
        return len(self.statuses)

    @property
    def answered(self) -> NDArray[np.bool_]:
        """[R] whether answered with status 200."""
        return np.equal(self.statuses, 200)

    @property
    def achieved_rate(self) -> float:
        """Answers with status 200 per second."""
        in_time = self.answered & (self.done_s <= self.seconds)
        return float(in_time.sum()) / self.seconds if self.seconds else 0.0

    @property
    def latency_ms(self) -> Times:
        """[R] from when the request was due to its answer; infinite for failures."""
        return np.where(self.answered, (self.done_s - self.intended_s) * 1e3, np.inf)

    def percentile_ms(self, percent: float, of_all: bool = True) -> float:
        """A percentile of the latency, over all requests (failures are infinitely late) or over answers only."""
        latencies = self.latency_ms if of_all else self.latency_ms[self.answered]
        return float(np.percentile(latencies, percent, method="higher")) if len(latencies) else float("nan")

    @property
    def failures(self) -> dict[str, int]:
        """Numbers of requests without a 200 answer, by status or cause."""
        found = Counter(int(status) for status in self.statuses if status != 200)
        return {STATUS_NAMES.get(status, str(status)): found[status] for status in sorted(found)}

    @property
    def late_sending_ms(self) -> float:
        """99th percentile of the client's own delay in sending, which is part of the latencies."""
        return float(np.percentile((self.sent_s - self.intended_s) * 1e3, 99)) if self.n_sent else 0.0

    def summary(self, offered_rate: float | None = None) -> dict[str, Any]:
        """The main numbers in JSON types. Latencies are over answers only; `failures` has the counts of the rest."""
        return {
            "offered_per_s": offered_rate,
            "achieved_per_s": self.achieved_rate,
            "sent": self.n_sent,
            "answered": int(self.answered.sum()),
            "failures": self.failures,
            **{f"p{p}_ms": self.percentile_ms(p, of_all=False) for p in (50, 95, 99)},
            "max_ms": self.percentile_ms(100, of_all=False),
            "late_sending_p99_ms": self.late_sending_ms,
            "seconds": self.seconds,
            "client_cpu_share": self.client_cpu_s / self.seconds if self.seconds else 0.0,
            "client_cpu_us_per_request": 1e6 * self.client_cpu_s / self.n_sent if self.n_sent else 0.0,
        }
