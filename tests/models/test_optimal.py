"""Searched thresholds, compared with all possible thresholds, and on noise."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.exits import outcome, take_exits
from models.frontier import build_frontier
from models.optimal import _ascend, _levels, _sweep, optimal_thresholds

COSTS = [10.0, 20.0, 40.0]


def heads(n_images: int, seed: int, knows: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    ease = draw.normal(size=(n_images, 1)) + draw.normal(size=(n_images, 3)) * 0.3
    return knows * ease + draw.normal(size=ease.shape) * 0.5, ease + np.array([0.0, 0.5, 1.0]) > 0


def test_the_search_finds_almost_all_optimal_thresholds() -> None:
    """Compared with all 13 x 13 thresholds for twelve images: ascent is optimal at nearly every price."""
    prices = np.geomspace(0.1, 1e-3, 15)
    n_best = 0
    for seed in range(6):
        scores, correct = heads(12, seed)
        edges, levels = _levels(scores)
        found = _sweep(levels, correct, np.array(COSTS), prices, len(edges)).astype(int)
        cuts = [[*np.unique(scores[:, i]).tolist(), np.inf] for i in range(2)]
        every = [outcome(scores, correct, COSTS, [a, b, -np.inf]) for a, b in itertools.product(*cuts)]
        for price, (first, second, _) in zip(prices, found, strict=True):
            best = max(o.accuracy - price * o.mean_cost for o in every)
            chosen = outcome(scores, correct, COSTS, [edges[first, 0], edges[second, 1], -np.inf])
            ours = chosen.accuracy - price * chosen.mean_cost
            assert ours <= best + 1e-9
            n_best += ours >= best - 1e-9
    assert n_best >= 0.9 * 6 * len(prices)


@given(st.integers(0, 10_000))
def test_an_ascent_ends_at_a_coordinatewise_optimum(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n_images, n_exits, n_cuts = draw.integers(1, 30), draw.integers(2, 5), 5
    levels, values = draw.integers(0, n_cuts - 1, (n_images, n_exits)), draw.normal(size=(n_images, n_exits))

    def worth(cuts: np.ndarray) -> float:
        return float(values[np.arange(n_images), take_exits(levels, cuts)].mean())

    start = draw.integers(0, n_cuts, n_exits)
    start[-1] = 0
    reached, cuts = _ascend(levels, values, start, n_cuts)
    assert reached == pytest.approx(worth(cuts))
    assert reached >= worth(start) - 1e-9
    for i, cut in itertools.product(range(n_exits - 1), range(n_cuts)):
        assert worth(np.where(np.arange(n_exits) == i, cut, cuts)) <= reached + 1e-9 / n_images + 1e-12


def test_it_runs_from_exit_1_to_the_best_accuracy_and_never_falls() -> None:
    scores, correct = heads(2000, 1)
    thresholds = optimal_thresholds(scores, correct, COSTS, 33)
    measured = [outcome(scores, correct, COSTS, t) for t in thresholds]
    assert measured[0].shares == (1.0, 0.0, 0.0)
    assert (np.diff(thresholds[:, :2], axis=0) >= 0).all()
    assert np.isneginf(thresholds[:, 2]).all()
    assert measured[-1].accuracy > correct.mean(axis=0).max() - 0.005


def test_either_half_of_the_images_counts_as_much_as_the_other() -> None:
    scores, correct = heads(400, 6)
    swapped = np.arange(400).reshape(-1, 2)[:, ::-1].ravel()
    expected = optimal_thresholds(scores, correct, COSTS, 33)
    assert np.array_equal(optimal_thresholds(scores[swapped], correct[swapped], COSTS, 33), expected)


def test_it_skips_an_exit_that_is_not_worth_its_cost() -> None:
    """Exit 2 is no better than exit 1, and expensive; shares by a formula send images there nevertheless."""
    scores, correct = heads(4000, 2)
    correct[:, 1] = correct[:, 0]
    searched = build_frontier(scores, correct, COSTS, "optimal")
    by_formula = build_frontier(scores, correct, COSTS, "geometric")
    other_scores, other_correct = heads(20_000, 3)
    other_correct[:, 1] = other_correct[:, 0]
    gains = []
    for cost in (15.0, 20.0, 25.0):
        accuracy = []
        for frontier in (searched, by_formula):
            done = [outcome(other_scores, other_correct, COSTS, t) for t in frontier.thresholds]
            accuracy.append(np.interp(cost, [o.mean_cost for o in done], [o.accuracy for o in done]))
        gains.append(accuracy[0] - accuracy[1])
    assert min(gains) > 0.003


def test_noise_scores_do_not_overestimate_accuracy() -> None:
    """The search has 1,000 chances of overfitting, which halves and levels prevent."""
    scores, correct = heads(1000, 4, knows=0.0)
    frontier = build_frontier(scores, correct, COSTS, "optimal")
    other_scores, other_correct = heads(20_000, 5, knows=0.0)
    for promised, thresholds in zip(frontier.accuracy, frontier.thresholds, strict=True):
        kept = outcome(other_scores, other_correct, COSTS, thresholds).accuracy
        assert promised - kept < 0.05


@pytest.mark.parametrize("bad", [-np.inf, 1e30])
def test_unusual_scores_and_few_images_work(bad: float) -> None:
    scores = np.array([[bad, 1.0, 0.0], [0.0, bad, 0.0], [1.0, 1.0, bad]])
    correct = np.array([[True, True, False], [False, True, True], [False, False, True]])
    thresholds = optimal_thresholds(scores, correct, COSTS, 5)
    assert thresholds.shape == (5, 3)
    assert not np.isnan(thresholds).any()
    assert optimal_thresholds(scores[:, :1], correct[:, :1], COSTS[:1], 1).tolist() == [[-np.inf]]


@pytest.mark.parametrize("exit_index", [0, 1])
def test_an_exit_without_finite_scores_has_thresholds_too(exit_index: int) -> None:
    for seed in range(20):
        scores, correct = heads(20, seed)
        scores[:, exit_index] = -np.inf
        assert not np.isnan(optimal_thresholds(scores, correct, COSTS, 33)).any()
