"""Promise 5 under a virtual clock: at three times the stages' capacity, that capacity is answered, in time, and the
rest is refused at once. The host cost of refusing is not included: `python -m benchmarks.overload` measures it.
"""

from functools import cache

import numpy as np
import pytest

from service.budget.controller import BudgetController
from service.budget.degrade import Degrade
from tests.service.open_loop import Record, capacity, simulate_open_loop
from tests.service.simulation import COSTS_MFLOPS, FULL_MFLOPS, frontier

FRACTION = 0.4  # of the full network, on average
MFLOPS_PER_S = 13_000.0
CAPACITY = capacity(frontier(), n_lanes=2, mflops_per_s=MFLOPS_PER_S) * frontier().cost[-1] / (FRACTION * FULL_MFLOPS)
MAX_QUEUE_S = 0.5
IN_TIME_S = 2 * MAX_QUEUE_S  # the longest accepted mean wait, and the image's own time
FROM_S, TO_S = 2.0, 8.0  # once the queue is full


@cache
def offered(times: float) -> Record:
    """Simulate traffic at a multiple of the capacity."""
    budget = BudgetController(frontier(), COSTS_MFLOPS, FRACTION * FULL_MFLOPS)
    phases = [(TO_S, times * CAPACITY)]
    degrade = Degrade(budget, 1_024)
    return simulate_open_loop(
        budget, degrade, phases, seed=3, max_queue_s=MAX_QUEUE_S, mflops_per_s=MFLOPS_PER_S
    ).between(FROM_S, TO_S)


def goodput(times: float) -> float:
    """Answers in time, per second."""
    return sum(arrival.took_s <= IN_TIME_S for arrival in offered(times).answered) / (TO_S - FROM_S)


@cache
def peak() -> float:
    return max(goodput(times) for times in (0.8, 0.9, 1.0, 1.1))


def test_the_peak_is_near_the_stages_capacity() -> None:
    assert 0.9 * CAPACITY < peak() <= 1.05 * CAPACITY
    assert not offered(0.8).refused


@pytest.mark.parametrize("times", [1.5, 2.0, 3.0, 6.0])
def test_above_the_capacity_goodput_stays_and_the_rest_is_refused_at_once(times: float) -> None:
    record = offered(times)
    assert goodput(times) >= 0.95 * peak()
    assert all(arrival.took_s <= IN_TIME_S for arrival in record.answered)
    # A refused image was never admitted, and no more are refused than could not be answered.
    assert len(record.refused) == pytest.approx((times * CAPACITY - peak()) * (TO_S - FROM_S), rel=0.1)


def test_accuracy_under_overload_is_unchanged() -> None:
    calm, stormy = offered(0.8), offered(3.0)
    assert stormy.mean_mflops == pytest.approx(calm.mean_mflops, rel=0.03)
    error = np.sqrt(0.25 / len(calm.answered) + 0.25 / len(stormy.answered))
    assert stormy.accuracy == pytest.approx(calm.accuracy, abs=4 * error)
