"""The table of measured costs: it starts from the warm-up, follows drift, forgets outliers, and stays small."""

import random
from itertools import pairwise

import pytest

from service.engine.costs import CostTable


def run(costs: CostTable, n_batches: int, fixed_s: float, row_s: float, rows=(1, 32), noise=0.1, seed=0) -> None:
    rng = random.Random(seed)
    for _ in range(n_batches):
        n_rows = rng.randint(*rows)
        costs.ran(0, n_rows, (fixed_s + row_s * n_rows) * rng.uniform(1 - noise, 1 + noise))


@pytest.mark.parametrize("sizes", [(1, 4, 16, 32), (1, 33), (1, 4, 16, 20)])
def test_it_starts_with_a_line_fitted_to_the_warm_up(sizes):
    costs = CostTable([{n: 2.0 + 0.5 * n for n in sizes}, {8: 4.0}])
    assert costs.fixed_s(0) == pytest.approx(2.0)
    for n_rows in (10, 32, 64, 1_000):
        assert costs.seconds(0, n_rows) == pytest.approx(2.0 + 0.5 * n_rows)
    assert costs.fixed_s(1) == 0.0  # from one size, the fixed part cannot be determined
    assert costs.seconds(1, 100) == pytest.approx(50.0)


def test_neither_part_is_negative_whatever_was_measured():
    measured = {1: 1.0, 16: 1.0, 32: 0.5}, {1: 0.001, 4: 0.024, 16: 0.040}, {1: 0.0, 32: 0.0}, {1: 1e-4, 2: 1e5}
    for seconds in measured:
        costs = CostTable([seconds])
        assert costs.fixed_s(0) >= 0
        assert costs.seconds(0, 1_000) >= costs.seconds(0, 600)


def test_host_time_per_batch_counts_as_fixed_cost():
    costs = CostTable([{1: 2.5, 32: 18.0}, {1: 0.0}], host_batch_s=0.5)
    assert costs.fixed_s(0) == pytest.approx(2.5)
    assert costs.seconds(0, 32) == pytest.approx(18.0)  # its run alone
    assert costs.fixed_s(1) == 0.0


@pytest.mark.parametrize(("fixed_s", "row_s"), [(10.0, 2.5), (0.1, 0.1), (2.0, 3.0)])
def test_it_learns_a_drift_of_all_sizes(fixed_s, row_s):
    costs = CostTable([{1: 2.5, 4: 4.0, 16: 10.0, 32: 18.0}])
    run(costs, 2_000, fixed_s, row_s)
    for n_rows in (4, 10, 32):
        assert costs.seconds(0, n_rows) == pytest.approx(fixed_s + row_s * n_rows, rel=0.1)
    assert costs.fixed_s(0) == pytest.approx(fixed_s, abs=0.1 * fixed_s + 0.4 * row_s)


def test_sizes_that_do_not_run_follow_the_drift_of_those_that_do():
    costs = CostTable([{1: 2.5, 4: 4.0, 16: 10.0, 32: 18.0}])
    run(costs, 40, 2.0, 0.5)
    run(costs, 400, 6.0, 1.5, rows=(32, 32))  # three times slower
    for n_rows in (1, 4, 16, 32):
        assert costs.seconds(0, n_rows) == pytest.approx(3 * (2.0 + 0.5 * n_rows), rel=0.35)
    assert costs.seconds(0, 32) == pytest.approx(54.0, rel=0.05)


def test_an_outlier_changes_it_by_a_few_per_cent_only():
    costs = CostTable([{1: 2.5, 32: 18.0}])
    run(costs, 200, 2.0, 0.5)
    before = costs.seconds(0, 20)
    costs.ran(0, 20, 1e6)
    assert before < costs.seconds(0, 20) < 1.1 * before
    costs.ran(0, 20, 0.0)
    run(costs, 100, 2.0, 0.5, seed=1)
    assert costs.seconds(0, 20) == pytest.approx(before, rel=0.05)


def test_copy_time_is_learned_separately_and_forgotten_without_copies():
    costs = CostTable([{1: 2.5, 32: 18.0}])
    assert costs.copy_s(0) == 0.0
    for _ in range(50):
        costs.ran(0, 16, 10.0 + 1.6, copy_seconds=1.6)
    assert costs.copy_s(0) == pytest.approx(0.1)
    assert costs.seconds(0, 16) == pytest.approx(10.0, rel=0.05)
    costs.ran(0, 16, 1_000.0, copy_seconds=990.0)
    assert costs.copy_s(0) < 0.11
    run(costs, 200, 2.0, 0.5)
    assert costs.copy_s(0) < 0.01  # so that it is tried, and measured, again


def test_unknown_costs_are_learned_from_live_batches_in_little_memory():
    costs = CostTable([{1: 0.0}])
    run(costs, 2_000, 2.0, 0.5, rows=(1, 500))
    assert costs.seconds(0, 100) == pytest.approx(52.0, rel=0.1)
    sizes = sorted(costs._stages[0].buckets)
    assert len(sizes) <= 10
    assert all(large == 2 * small for small, large in pairwise(sizes))
