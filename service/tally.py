"""Counts of request outcomes and histograms of their times, as numbers in one block of memory.

One event loop writes a tally, and any process that maps the memory may read it. So each HTTP process counts without
sending messages, and its counts outlive it.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

Outcome = Literal["answered", "invalid", "overloaded", "unavailable", "abandoned", "failed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

# 15 bounds and +Inf: no histogram has more than 16 buckets. Denser just above 1 s, where answers under overload lie.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0)
DECODE_SECONDS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)

CELL_BYTES = 8  # a float64, which is read and written whole
HISTOGRAM_CELLS = len(SECONDS) + 2  # a count per bucket, and the sum
OUTCOME_AT = {outcome: i for i, outcome in enumerate(OUTCOMES)}
DECODE_AT = len(OUTCOMES)


def tally_bytes(n_exits: int) -> int:
    """The size of a tally's memory."""
    return CELL_BYTES * (DECODE_AT + HISTOGRAM_CELLS * (1 + n_exits))


class Tally:
    """Counts the requests of one event loop.

    Args:
        n_exits: of the network.
        memory: `tally_bytes(n_exits)` bytes: zeros, or an earlier tally to continue; by default newly allocated.
    """

    def __init__(self, n_exits: int, memory: memoryview | None = None) -> None:
        self.n_exits = n_exits
        self._cells = (memoryview(bytearray(tally_bytes(n_exits))) if memory is None else memory).cast("d")

    def count(self, outcome: Outcome) -> None:
        """Count a request that has ended."""
        self._cells[OUTCOME_AT[outcome]] += 1.0

    def decoded(self, seconds: float) -> None:
        """Record that an image was decoded in `seconds`."""
        self._observe(DECODE_AT, DECODE_SECONDS, seconds)

    def responded(self, exit_number: int, seconds: float) -> None:
        """Record an answer at an exit (from 1), `seconds` after the last byte of the request's body."""
        self._observe(DECODE_AT + HISTOGRAM_CELLS * exit_number, SECONDS, seconds)

    def _observe(self, start: int, bounds: Sequence[float], value: float) -> None:
        self._cells[start + bisect_left(bounds, value)] += 1.0
        self._cells[start + HISTOGRAM_CELLS - 1] += value

    def read(self) -> Sequence[float]:
        return self._cells.tolist()


def families(tallies: Sequence[Tally]) -> Iterable[Metric]:
    """The sums of tallies of the same network, as Prometheus metrics."""
    cells = [sum(values) for values in zip(*(tally.read() for tally in tallies), strict=True)]
    requests = CounterMetricFamily("exitserve_requests", "Classification requests, by outcome", labels=["outcome"])
    for outcome, at in OUTCOME_AT.items():
        requests.add_metric([outcome], cells[at])
    yield requests
    decode = HistogramMetricFamily("exitserve_decode_seconds", "Decoding an image")
    add_histogram(decode, [], cells, DECODE_AT, DECODE_SECONDS)
    yield decode
    by_exit = HistogramMetricFamily(
        "exitserve_request_seconds", "From the last byte of a request's body to its answer, by exit", labels=["exit"]
    )
    for number in range(1, tallies[0].n_exits + 1):
        add_histogram(by_exit, [str(number)], cells, DECODE_AT + HISTOGRAM_CELLS * number, SECONDS)
    yield by_exit


def add_histogram(
    family: HistogramMetricFamily, labels: list[str], cells: Sequence[float], start: int, bounds: Sequence[float]
) -> None:
    """Add the histogram in `cells` from `start` on: a count per bucket (the last: above all bounds), then the sum."""
    buckets: list[tuple[str, float]] = []
    total = 0.0
    for i, bound in enumerate((*bounds, float("inf"))):
        total += cells[start + i]
        buckets.append((floatToGoString(bound), total))
    family.add_metric(labels, buckets, cells[start + len(bounds) + 1])
