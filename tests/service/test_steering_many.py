"""Thousands of images in flight, as GPUs want them: the real core, budget and scheduler under a virtual clock, on the
held-out scores that ship with a bundle."""

import numpy as np
import pytest

from benchmarks.steering import Traffic, network_of, times_of
from models.bundle import load_bundle
from service.plan.simulation import Setup, Simulation
from tests.data import REPOSITORY

ROUNDS = 12  # so many times those in flight are answered


# Of three orders each, the mean of what settles is 0.98 to 1.02 of the budget.
@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.6])
@pytest.mark.parametrize(("max_rows", "in_flight"), [(256, 2_048), (512, 4_096), (512, 8_192)])
def test_the_budget_is_used_and_kept_with_thousands_in_flight(max_rows: int, in_flight: int, fraction: float) -> None:
    network, _ = network_of(load_bundle(REPOSITORY / "models/zoo/cifar100-msdnet"))
    budget_mflops = fraction * network.costs_mflops[-1]
    times = times_of(network, Traffic("", 2, max_rows, in_flight))
    record = Simulation(network, times, Setup(budget_mflops, 2, 2, max_rows), seed=1).saturate(
        ROUNDS * in_flight, in_flight
    )
    spent = np.array(record.spent[ROUNDS * in_flight // 3 :]) / 1e6 / budget_mflops
    assert 0.97 < spent.mean() < 1.03
