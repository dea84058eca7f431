"""The frontier: its properties at and between its points, on held-out images and on other traffic."""

import math
from itertools import pairwise

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.exits import SCORES, Calibrator, outcome, take_exits
from models.frontier import FAMILIES, SHARES, Frontier, _interpolable, build_frontier

C_BATCH_4 = [15.140452, 25.751240, 33.659180, 43.336592, 51.822068, 60.307544]


def simulated_heads(
    n_images: int, seed: int = 0, score: str = "max_softmax", n_exits: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and correctness of simulated heads with common difficulty, each deeper one slightly better."""
    rng = np.random.default_rng(seed)
    labels, rows = rng.integers(0, 20, n_images), np.arange(n_images)
    ease, shared = rng.normal(size=n_images), rng.normal(size=(n_images, 20))
    scores, correct = [], []
    for n in range(n_exits):
        logits = 1.5 * (0.85 * shared + 0.5 * rng.normal(size=shared.shape))
        logits[rows, labels] += 2.5 + 2.0 * ease + 1.5 * (1 - math.exp(-n / 1.5))
        scores.append(SCORES[score](logits.astype(np.float32)))
        correct.append(logits.argmax(axis=1) == labels)
    return np.stack(scores, axis=1), np.stack(correct, axis=1)


@pytest.fixture(scope="module", params=[None, *FAMILIES])
def frontier(request: pytest.FixtureRequest) -> Frontier:
    return build_frontier(*simulated_heads(3000), C_BATCH_4, family=request.param)


def test_it_runs_from_exit_1_to_the_best_accuracy(frontier: Frontier) -> None:
    _, correct = simulated_heads(3000)
    first = frontier.at(0.0)
    assert first.thresholds == (-math.inf,) * 6
    assert (first.cost, first.shares) == (C_BATCH_4[0], (1.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    assert first.accuracy == correct[:, 0].mean()
    assert frontier.position[0] == 0.0
    assert frontier.position[-1] == 1.0
    assert all(a < b for a, b in pairwise(frontier.position))
    assert all(a < b for a, b in pairwise(frontier.cost))
    assert frontier.accuracy[-1] >= correct[:, -1].mean() - 0.0005
    assert frontier.cost[-1] < 0.9 * C_BATCH_4[-1]  # the last exits of these heads gain nothing


def test_each_point_matches_its_thresholds(frontier: Frontier) -> None:
    scores, correct = simulated_heads(3000)
    for i, position in enumerate(frontier.position):
        measured = outcome(scores, correct, C_BATCH_4, frontier.thresholds[i])
        assert (measured.mean_cost, measured.accuracy) == (frontier.cost[i], frontier.accuracy[i])
        assert measured.shares == frontier.shares[i]
        assert frontier.at(position).cost == pytest.approx(frontier.cost[i], rel=1e-12)


def test_shares_times_cost_is_the_cost_of_running_the_stages(frontier: Frontier) -> None:
    """Stage by stage with compacted survivors, as a server runs them: the rows of each stage times its cost."""
    scores, _ = simulated_heads(3000)
    own_cost = np.diff(C_BATCH_4, prepend=0.0)
    for position in (0.1, 0.5, 0.9):
        thresholds = frontier.at(position).thresholds
        here, spent, counts = np.arange(len(scores)), 0.0, []
        for stage, threshold in enumerate(thresholds):
            spent += len(here) * own_cost[stage]
            stays = scores[here, stage] < threshold
            counts.append(len(here) - int(stays.sum()))
            here = here[stays]
        measured = outcome(scores, np.ones(scores.shape, dtype=bool), C_BATCH_4, thresholds)
        assert len(here) == 0
        assert measured.shares == tuple(count / len(scores) for count in counts)
        assert np.dot(measured.shares, C_BATCH_4) == pytest.approx(spent / len(scores), rel=1e-12)
        assert measured.mean_cost == pytest.approx(spent / len(scores), rel=1e-12)


def test_between_points_it_matches_its_interpolated_thresholds(frontier: Frontier) -> None:
    scores, correct = simulated_heads(3000)
    for position in np.linspace(0, 1, 97):
        point = frontier.at(position)
        measured = outcome(scores, correct, C_BATCH_4, point.thresholds)
        assert measured.mean_cost == pytest.approx(point.cost, abs=0.005 * C_BATCH_4[-1])
        assert measured.accuracy == pytest.approx(point.accuracy, abs=0.003)
        assert measured.shares == pytest.approx(point.shares, abs=0.01)


def test_it_loses_almost_nothing_to_exact_quotas(frontier: Frontier) -> None:
    """Monotone, interpolable thresholds are a change to the calibration: it must cost no accuracy.

    Searched thresholds are the mean of two searches, and not the best of either: they are held to a little less.
    """
    scores, correct = simulated_heads(3000)
    calibrator = Calibrator(scores)
    for cost in np.linspace(C_BATCH_4[0], frontier.cost[-1], 20).tolist():
        shares_of = SHARES.get(frontier.family, SHARES["geometric"])
        quotas = calibrator.thresholds(shares_of(C_BATCH_4, cost))
        ours = frontier.at_cost(cost)
        allowed = 0.002 if frontier.family in SHARES else 0.008
        assert ours.accuracy >= outcome(scores, correct, C_BATCH_4, quotas).accuracy - allowed


def test_on_other_traffic_every_image_goes_as_deep_or_deeper(frontier: Frontier) -> None:
    unlike_any_held_out = np.random.default_rng(9).normal(size=(500, 6)) * 4
    exits = [take_exits(unlike_any_held_out, frontier.at(position).thresholds) for position in np.linspace(0, 1, 301)]
    assert all((a <= b).all() for a, b in pairwise(exits))
    assert (exits[0] == 0).all()


def test_cost_and_accuracy_look_ups(frontier: Frontier) -> None:
    for position in (0.0, 0.123, 0.5, 1.0):
        assert frontier.at_cost(frontier.at(position).cost).position == pytest.approx(position, abs=1e-12)
    assert frontier.at_cost(0.0).position == 0.0
    assert frontier.at_cost(1e9).position == 1.0
    for accuracy in np.linspace(frontier.accuracy[0], max(frontier.accuracy), 50).tolist():
        position = frontier.at_accuracy(accuracy).position
        assert frontier.at(position).accuracy == pytest.approx(accuracy, abs=1e-12)
        cheaper = np.linspace(0, position, 200, endpoint=False)
        assert all(frontier.at(p).accuracy < accuracy + 1e-12 for p in cheaper)
    assert frontier.at_accuracy(0.0).position == 0.0
    with pytest.raises(ValueError, match=r"best within reach is 0\.") as refused:
        frontier.at_accuracy(0.999)
    assert f"{max(frontier.accuracy):.4f}" in str(refused.value)


def test_an_accuracy_is_reached_at_the_cheapest_point_even_if_costlier_ones_fall_short() -> None:
    cost, shares = (1.0, 2.0, 3.0, 4.0, 5.0), ((1.0, 0.0),) * 5
    accuracy = (0.5, 0.7, 0.6, 0.65, 0.8)
    dips = Frontier("ratio", (0.0, 0.25, 0.5, 0.75, 1.0), cost, accuracy, shares, ((0.0, -math.inf),) * 5)
    found = [dips.at_accuracy(wanted).cost for wanted in (0.65, 0.7, 0.75)]
    assert found == pytest.approx([1.75, 2.0, 4 + 2 / 3])


def test_thresholds_that_all_or_no_images_reach_stay_so() -> None:
    scores = np.array([[3.0, 0.0], [1.0, 0.0], [2.0, -np.inf]])
    everybody, nobody = _interpolable(np.array([[-np.inf, -np.inf], [np.inf, -np.inf]]), scores)
    assert everybody[0] < 1.0
    assert 3.0 < nobody[0] < math.inf


def test_positions_outside_are_clamped(frontier: Frontier) -> None:
    assert frontier.at(-3.0) == frontier.at(math.nan) == frontier.at(0.0)
    assert frontier.at(7.0) == frontier.at(1.0)


def test_points_are_plain_numbers(frontier: Frontier) -> None:
    for point in (frontier.at(0.0), frontier.at(0.4), frontier.at(1.0)):
        numbers = [point.position, point.cost, point.accuracy, *point.shares, *point.thresholds]
        assert {type(number) for number in numbers} == {float}
        assert point.thresholds[-1] == -math.inf
        assert not any(math.isnan(number) for number in numbers)


def test_the_better_family_is_chosen() -> None:
    held_out = simulated_heads(3000)
    built = {family: build_frontier(*held_out, C_BATCH_4, family=family) for family in SHARES}
    budgets = np.linspace(C_BATCH_4[0], C_BATCH_4[-1], 50)
    mean = {name: np.interp(budgets, f.cost, f.best_accuracy).mean() for name, f in built.items()}
    assert build_frontier(*held_out, C_BATCH_4) == built[max(mean, key=lambda name: mean[name])]


def test_one_lucky_image_does_not_move_the_end() -> None:
    """Exit 3 answers like exit 2, except for a lucky image that only a much larger budget takes there."""
    scores, correct = simulated_heads(2000, n_exits=3)
    correct[:, 1] |= correct[:, 0]
    correct[:, 2] = correct[:, 1]
    plateau = correct[:, 1].mean()
    sure_but_wrong = [i for i in np.argsort(-scores[:, 1]) if not correct[i, 1]]
    correct[sure_but_wrong[0], 2] = True
    lucky = build_frontier(scores, correct, [1.0, 2.0, 3.0])
    assert plateau - 0.0006 < lucky.accuracy[-1] <= plateau
    correct[sure_but_wrong[:100], 2] = True
    better = build_frontier(scores, correct, [1.0, 2.0, 3.0])
    assert better.accuracy[-1] > plateau + 0.045
    assert better.cost[-1] > lucky.cost[-1] + 0.1


def test_a_network_without_gain_from_depth_has_one_point() -> None:
    scores, correct = simulated_heads(400)
    flat = build_frontier(scores, np.repeat(correct[:, :1], 6, axis=1), C_BATCH_4)
    single = build_frontier(scores[:, :1], correct[:, :1], [5.0])
    for frontier, n_exits in ((flat, 6), (single, 1)):
        assert frontier.position == (0.0,)
        assert frontier.at(0.0) == frontier.at(0.5) == frontier.at(1.0)
        assert frontier.at(1.0).thresholds == (-math.inf,) * n_exits
        assert frontier.at_cost(1e9).position == 0.0
        assert frontier.at_accuracy(frontier.accuracy[0]).position == 0.0


@settings(max_examples=50)
@given(
    st.integers(1, 40).flatmap(
        lambda m: st.tuples(
            hnp.arrays(np.float32, (m, 4), elements=st.one_of(st.integers(-2, 2), st.just(-np.inf), st.just(1e30))),
            hnp.arrays(np.bool_, (m, 4)),
        )
    ),
    st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=9),
    st.sampled_from([None, *FAMILIES]),
)
def test_any_scores_give_a_consistent_frontier(
    held_out: tuple[np.ndarray, np.ndarray], positions: list[float], family: str | None
) -> None:
    costs = [1.0, 2.5, 3.0, 7.0]
    frontier = build_frontier(*held_out, costs, family, n_points=33)
    exits = [take_exits(held_out[0], frontier.at(position).thresholds) for position in sorted(positions)]
    assert all((a <= b).all() for a, b in pairwise(exits))
    assert all(a < b for a, b in pairwise(frontier.cost))
    assert frontier.cost[0] >= costs[0]
    assert frontier.cost[-1] <= costs[-1] * (1 + 1e-12)
    assert not np.isnan(frontier.thresholds).any()
    for shares in frontier.shares:
        assert sum(shares) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("scores", "correct", "costs", "family", "message"),
    [
        (np.zeros((4, 2)), np.zeros((4, 3), dtype=bool), [1.0, 2.0], None, r"\(4, 3\)"),
        (np.zeros((4, 2)), np.zeros((4, 2), dtype=bool), [1.0, 2.0, 3.0], None, "3 costs"),
        (np.zeros((4, 2)), np.zeros((4, 2), dtype=bool), [2.0, 1.0], None, "strictly increasing"),
        (np.zeros((4, 2)), np.zeros((4, 2), dtype=bool), [1.0, 2.0], "best", "known: geometric, ratio, optimal"),
    ],
)
def test_inconsistent_inputs_are_refused(
    scores: np.ndarray, correct: np.ndarray, costs: list[float], family: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_frontier(scores, correct, costs, family)
