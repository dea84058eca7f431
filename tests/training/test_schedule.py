import math
from itertools import pairwise

import pytest

from tests.training import tiny
from training.recipe import Optimisation
from training.schedule import learning_rate

STEPS = 10


def optimisation(**fields: object) -> Optimisation:
    return tiny.recipe(optimisation={"learning_rate": 0.5, "epochs": 20, **fields}).optimisation


def test_multistep_changes_after_whole_epochs() -> None:
    o = optimisation(schedule="multistep", milestones=[5, 12], decay=0.1)
    rates = [learning_rate(o, step, STEPS) for step in range(200)]
    assert rates[:50] == [0.5] * 50
    assert rates[50:120] == pytest.approx([0.05] * 70)
    assert rates[120:] == pytest.approx([0.005] * 80)


def test_cosine_falls_from_the_peak_to_almost_nothing() -> None:
    o = optimisation(schedule="cosine")
    rates = [learning_rate(o, step, STEPS) for step in range(200)]
    assert rates[0] == 0.5
    assert rates[100] == pytest.approx(0.25)
    assert all(a > b for a, b in pairwise(rates))
    assert 0 < rates[-1] < 0.5 * (1 - math.cos(math.pi / 200))


def test_one_cycle_rises_to_the_peak_and_falls() -> None:
    o = optimisation(schedule="one_cycle", warmup_fraction=0.25)
    rates = [learning_rate(o, step, STEPS) for step in range(200)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[50] == pytest.approx(0.5)
    assert all(a < b for a, b in pairwise(rates[:51]))
    assert all(a > b for a, b in pairwise(rates[50:]))
    assert 0 < rates[-1] < 0.001
