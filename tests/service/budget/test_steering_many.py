"""Steering with thousands of images in flight, as on GPUs: the real core, budget and scheduler under a virtual clock,
with the held-out scores of the bundle that ships."""

import numpy as np
import pytest

from benchmarks.steering import Traffic, network_of, times_of
from models.bundle import load_bundle
from service.assembly import build_engine
from service.budget.ledger import Ledger, window_for
from service.plan.simulation import Setup, Simulation
from tests.data import REPOSITORY

ROUNDS = 12  # so many times those in flight are answered


@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.6])
@pytest.mark.parametrize(("max_rows", "in_flight"), [(256, 2_048), (512, 4_096), (512, 8_192)])
def test_the_budget_is_used_and_kept_with_thousands_in_flight(max_rows: int, in_flight: int, fraction: float) -> None:
    network, _ = network_of(load_bundle(REPOSITORY / "models/zoo/cifar100-msdnet"))
    budget_mflops = fraction * network.costs_mflops[-1]
    times = times_of(network, Traffic("", 2, max_rows, in_flight))
    setup = Setup(budget_mflops, 2, 2, max_rows, max_in_flight=in_flight)
    record = Simulation(network, times, setup, seed=1).saturate(ROUNDS * in_flight, in_flight)
    spent = np.array(record.spent[ROUNDS * in_flight // 3 :]) / 1e6 / budget_mflops
    assert 0.97 < spent.mean() < 1.03
    assert record.reason.count("budget") < 0.08 * len(record.reason)


def test_savings_of_many_answers_are_available_for_hard_images() -> None:
    """1,500 hard images in flight, after 6,000 answers that cost half of their budget."""
    assert [window_for(1_024), window_for(1_500)] == [1_000, 6_000]
    for max_in_flight, n_going_on in ((1_024, 750), (1_500, 1_500)):
        ledger = Ledger(100, burst_images=1_500, average_over=window_for(max_in_flight))
        for _ in range(6):
            ledger.close(ledger.open(50, 1_000), 1_000, 50, 50, answered=True)
        hard = ledger.open(50, 1_500)
        assert ledger.commit(hard, 1_500, 50, 150) == n_going_on


def test_the_engines_average_is_over_as_many_answers() -> None:
    bundle = load_bundle(REPOSITORY / "models/zoo/cifar100-msdnet")
    for max_in_flight in (1_024, 1_500):
        engine = build_engine(bundle, 24.0, device="cpu", n_lanes=1, max_in_flight_rows=max_in_flight)
        assert engine._core.budget.ledger._average_over == window_for(max_in_flight)
