"""The steering benchmark on the bundle that ships: its command, and the results that it must give."""

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import steering
from benchmarks.steering import TRAFFICS, main, network_of, simulate
from models.bundle import load_bundle
from models.exits import outcome
from service.plan.simulation import Network, Record
from tests.data import REPOSITORY

BUNDLE = REPOSITORY / "models" / "zoo" / "cifar100-msdnet"


@pytest.fixture(scope="module")
def network() -> Network:
    return network_of(load_bundle(BUNDLE))[0]


def test_its_command_reports_every_traffic(monkeypatch, capsys) -> None:
    monkeypatch.setattr(steering, "TRAFFICS", TRAFFICS[2:4])
    main(BUNDLE, None, fractions="0.3", orders=2, images=2_500)
    told = capsys.readouterr().out
    assert all(traffic.name in told for traffic in TRAFFICS[2:4])
    assert "2 orders of 2,500 of 5,000 held-out images" in told


def test_its_results_match_a_case_computed_by_hand() -> None:
    """Two exits at 1 and 3 M; half of the images are right at the first, all at the second."""
    correct = np.array([[True, True], [False, True]])
    scores = np.array([[1.0, 9.0], [0.0, 9.0]])
    network = Network(scores, correct, [1.0, 3.0], load_bundle(BUNDLE).frontier())
    n = 2_000
    record = Record(row=[0, 1] * (n // 2), exit=[1, 2] * (n // 2), spent=[1_000_000, 3_000_000] * (n // 2))
    record.reason = ["confident", "budget"] * (n // 2)
    found = steering.judge(network, record, 2.5, n_settling=1_500, fixed_accuracy=lambda rows, cost_mflops: 1.0)
    assert found.at_end == found.lowest == found.highest == pytest.approx(0.8)
    assert found.cut_short == 0.5
    assert found.lost == 0.0


def test_windows_count_from_settling_to_the_end() -> None:
    """One image whose cost changes: windows of two answers, against a budget of 2 M."""
    network = Network(np.array([[9.0]]), np.array([[True]]), [1.0], load_bundle(BUNDLE).frontier())
    spent = [9, 9, 1, 2, 4, 1, 2]  # M
    record = Record(row=[0] * 7, exit=[1] * 7, spent=[1_000_000 * mflops for mflops in spent], reason=["final"] * 7)
    asked = []

    def fixed(rows: NDArray[np.intp], cost_mflops: float) -> float:
        asked.append((len(rows), cost_mflops))
        return 0.75

    found = steering.judge(network, record, 2.0, n_settling=4, fixed_accuracy=fixed, window_answers=2)
    assert (found.at_end, found.lowest, found.highest) == (0.75, 0.75, 1.5)
    assert found.lost == -0.25  # all are right here, three in four with fixed thresholds: a gain
    assert asked == [(7, 4.0)]


def test_fixed_thresholds_are_compared_at_the_same_mean_cost(network: Network) -> None:
    rows = np.arange(len(network.scores))
    for position in (0.25, 0.5):
        found = outcome(network.scores, network.correct, network.costs_mflops, network.frontier.at(position).thresholds)
        assert steering.accuracy_at(network, rows, found.mean_cost) == pytest.approx(found.accuracy)


@pytest.mark.parametrize("traffic", [TRAFFICS[2], TRAFFICS[4], TRAFFICS[5]], ids=lambda traffic: traffic.name)
def test_budgets_are_spent_and_kept_and_no_image_is_cut_short(network: Network, traffic) -> None:
    """With half the burst, one image in six was cut short at 256 in flight on two lanes."""
    found = [simulate(network, traffic, 0.4 * network.costs_mflops[-1], 5_000, seed) for seed in range(3)]
    assert all(0.98 <= order.at_end <= 1.0 for order in found)
    assert all(order.cut_short < 0.03 for order in found)
    assert np.mean([order.lost for order in found]) < 0.006
