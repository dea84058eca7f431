"""The steering benchmark on the bundle that ships: its command, and the results that it must give."""

import numpy as np
import pytest

from benchmarks import steering
from benchmarks.steering import TRAFFICS, main, network_of, simulate
from models.bundle import load_bundle
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


@pytest.mark.parametrize("traffic", [TRAFFICS[2], TRAFFICS[4], TRAFFICS[5]], ids=lambda traffic: traffic.name)
def test_budgets_are_spent_and_kept_and_no_image_is_cut_short(network: Network, traffic) -> None:
    """With half the burst, one image in six was cut short at 256 in flight on two lanes."""
    found = [simulate(network, traffic, 0.4 * network.costs_mflops[-1], 5_000, seed) for seed in range(3)]
    assert all(0.98 <= order.at_end <= 1.0 for order in found)
    assert all(order.cut_short < 0.03 for order in found)
    assert np.mean([order.lost for order in found]) < 0.006
