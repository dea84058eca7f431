"""Exit scores, shares and thresholds: reference figures, exact quotas, and rules that hold for any scores."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from models.exits import (
    SCORES,
    confidence,
    outcome,
    read_softmax,
    take_exits,
)
from models.shares import ratio_shares, solve_exit_probability, solve_ratio, truncated_geometric_shares

C_ANY = [15140452, 25505992, 37788460, 52061840, 62181620, 74070872, 87729596, 100038944, 110121860, 121679336]

costs_cumulative = st.lists(st.floats(0.1, 100), min_size=1, max_size=8).map(lambda parts: list(np.cumsum(parts)))
logits = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 40), st.sampled_from([2, 3, 10, 100])), elements=st.floats(-60, 60, width=32)
)


# --- scores


def test_scores_of_a_known_row() -> None:
    row = np.log(np.array([[0.7, 0.2, 0.1]], dtype=np.float32))
    assert SCORES["max_softmax"](row) == pytest.approx(math.log(0.7 / 0.3), abs=1e-6)
    assert SCORES["logit_margin"](row) == pytest.approx(math.log(0.7 / 0.2), abs=1e-6)
    assert SCORES["probability_margin"](row) == pytest.approx(0.5 - 1, abs=1e-6)
    expected = sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert SCORES["entropy"](row) == pytest.approx(expected, abs=1e-6)
    assert confidence(row) == pytest.approx(0.7, abs=1e-6)


def test_log_odds_rank_what_the_softmax_maximum_cannot() -> None:
    rows = np.array([[40.0, 0.0, 0.0], [41.0, 0.0, 0.0], [900.0, 0.0, -900.0]], dtype=np.float32)
    assert (
        np.exp(rows - rows.max(1, keepdims=True)).max(1) / np.exp(rows - rows.max(1, keepdims=True)).sum(1) == 1
    ).all()
    for score in SCORES.values():
        assert np.argsort(score(rows)).tolist() == [0, 1, 2]
        assert len(set(score(rows).tolist())) == 3
    scores = SCORES["max_softmax"](rows)
    assert scores == pytest.approx([40 - math.log(2), 41 - math.log(2), 900], abs=1e-9)


@given(logits)
def test_log_odds_are_the_log_odds_of_the_confidence(rows: np.ndarray) -> None:
    largest = confidence(rows)
    assert ((largest > 0) & (largest <= 1)).all()
    assert 1 / (1 + np.exp(-SCORES["max_softmax"](rows))) == pytest.approx(largest, rel=1e-9)


@given(logits)
def test_entropy_and_margin_are_those_of_the_softmax(rows: np.ndarray) -> None:
    shares = np.exp(rows.astype(np.float64) - rows.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    logs = np.log(np.maximum(shares, 1e-300))
    assert SCORES["entropy"](rows) == pytest.approx((shares * logs).sum(axis=1), abs=1e-9)
    best = np.sort(shares, axis=1)
    assert 1 + SCORES["probability_margin"](rows) == pytest.approx(best[:, -1] - best[:, -2], abs=1e-9)


@given(logits, st.data())
def test_a_row_scores_the_same_bit_for_bit_whatever_its_batch(rows: np.ndarray, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
    for score in [*SCORES.values(), confidence]:
        whole = score(rows)
        assert np.array_equal(score(rows[chosen]), whole[chosen])
        assert np.array_equal(score(np.asfortranarray(rows)), whole)
        assert score(rows[chosen[0]][None])[0] == whole[chosen[0]]


@pytest.mark.parametrize("n_classes", [100, 1000])
def test_rows_of_real_sizes_score_the_same_alone_and_in_a_batch(n_classes: int) -> None:
    rows = (np.random.default_rng(1).normal(size=(64, n_classes)) * 4).astype(np.float32)
    for score in [*SCORES.values(), confidence]:
        assert np.array_equal(score(rows), np.concatenate([score(row[None]) for row in rows]))


def test_scores_do_not_modify_their_input() -> None:
    rows = np.array([[1.0, 3.0, 2.0]])
    for score in [*SCORES.values(), confidence]:
        score(rows)
    assert rows.tolist() == [[1.0, 3.0, 2.0]]


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [np.inf, np.inf], [-np.inf, -np.inf]])
def test_non_finite_logits_are_never_confident(bad: list[float]) -> None:
    rows = np.array([[2.0, 1.0], bad], dtype=np.float32)
    assert read_softmax(rows)[1].tolist() == confidence(rows).tolist()
    for score in SCORES.values():
        assert score(rows).tolist() == [score(rows[:1])[0], -np.inf]
        assert np.isfinite(score(rows[:1]))
    assert confidence(rows)[1] == 0.0


@given(logits)
def test_one_softmax_gives_the_same_as_three_functions(rows: np.ndarray) -> None:
    """Compared with a softmax in long double, so that precision is kept near 0 and near 1."""
    leading, largest, margin = read_softmax(rows)
    wide = rows.astype(np.longdouble)
    shares = np.exp(wide - wide.max(axis=1, keepdims=True))
    others = np.where(np.arange(rows.shape[1]) == rows.argmax(axis=1)[:, None], 0, shares)
    rest = others.sum(axis=1)
    assert np.array_equal(leading, rows.argmax(axis=1))
    np.testing.assert_allclose(largest, confidence(rows), rtol=1e-14)
    np.testing.assert_allclose(margin, -(rest + others.max(axis=1)) / (1 + rest), rtol=1e-13)
    assert np.array_equal(margin, SCORES["probability_margin"](rows))


def test_rows_that_are_not_finite_or_extreme_are_distinguished() -> None:
    rows = np.array([[2, 1, 0], [np.nan, 1, 0], [np.inf, 1, 0], [2, -np.inf, -np.inf], [2, 1, -np.inf], [900, 0, -900]])
    leading, largest, margin = read_softmax(rows.astype(np.float32))
    assert leading.tolist() == [0] * 6
    assert largest.tolist() == pytest.approx([confidence(rows[:1])[0], 0, 0, 1, 1 / (1 + math.exp(-1)), 1])
    assert np.isneginf(margin).tolist() == [False, True, True, True, False, False]
    assert margin[5] == 0.0
    assert margin[4] == pytest.approx(-2 / (1 + math.e))


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="2 classes or more"):
        SCORES["max_softmax"](np.zeros((4, 1), dtype=np.float32))


# --- shares for a budget


@pytest.mark.parametrize(
    ("budget_m", "p", "ratio"),
    [
        (20, 0.6943, 0.3057),
        (30, 0.4358, 0.5695),
        (50, 0.2355, 0.8186),
        (75, 0.1182, 1.0669),
        (100, 0.0460, 1.4825),
        (110, 0.0234, 1.9674),
    ],
)
def test_reference_roots(budget_m: float, p: float, ratio: float) -> None:
    assert solve_exit_probability(C_ANY, budget_m * 1e6) == pytest.approx(p, abs=1e-4)
    assert solve_ratio(C_ANY, budget_m * 1e6) == pytest.approx(ratio, abs=1e-4)


def test_ends_of_equation_9() -> None:
    assert solve_exit_probability(C_ANY, C_ANY[0]) == 1.0
    assert solve_exit_probability(C_ANY, C_ANY[-1]) == 0.0
    assert solve_ratio(C_ANY, C_ANY[0]) == pytest.approx(0.0, abs=1e-6)
    assert solve_ratio(C_ANY, C_ANY[-1]) == math.inf


@given(costs_cumulative, st.floats(0, 1))
@example([1.0, 4.0], 0.9999999999999999)
def test_every_budget_has_its_root(costs: list[float], fraction: float) -> None:
    budget = min(max(costs[0] + fraction * (costs[-1] - costs[0]), costs[0]), costs[-1])
    p, ratio = solve_exit_probability(costs, budget), solve_ratio(costs, budget)
    parts = np.diff(costs, prepend=0.0)
    assert sum((1 - p) ** n * part for n, part in enumerate(parts)) == pytest.approx(budget, rel=1e-9)
    assert truncated_geometric_shares(p, len(costs)) @ costs == pytest.approx(budget, rel=1e-9)
    assert ratio_shares(ratio, len(costs)) @ costs == pytest.approx(budget, rel=1e-6)


@given(costs_cumulative, st.floats(0, 1), st.floats(0, 1))
def test_cost_falls_with_the_exit_probability(costs: list[float], p: float, q: float) -> None:
    at_lower, at_higher = (truncated_geometric_shares(x, len(costs)) @ costs for x in sorted((p, q)))
    assert at_lower >= at_higher * (1 - 1e-12)


@given(st.floats(0, 1), st.floats(0, 1e6), st.integers(1, 12))
def test_shares_are_non_negative_and_sum_to_one(p: float, ratio: float, n_exits: int) -> None:
    for shares in (truncated_geometric_shares(p, n_exits), ratio_shares(ratio, n_exits)):
        assert shares.shape == (n_exits,)
        assert (shares >= 0).all()
        assert shares.sum() == pytest.approx(1.0)


def test_shares_by_hand() -> None:
    assert truncated_geometric_shares(0.5, 3).tolist() == [0.5, 0.25, 0.25]
    assert ratio_shares(0.75, 5) == pytest.approx([0.328, 0.246, 0.184, 0.138, 0.104], abs=5e-4)
    assert ratio_shares(1.0, 4).tolist() == [0.25] * 4
    assert ratio_shares(math.inf, 3).tolist() == [0, 0, 1]
    assert ratio_shares(0.0, 3).tolist() == [1, 0, 0]


@pytest.mark.parametrize("budget", [15e6, 121.7e6, math.nan])
def test_a_budget_no_exit_mix_can_meet_is_refused(budget: float) -> None:
    for solve in (solve_exit_probability, solve_ratio):
        with pytest.raises(ValueError, match=r"give 1\.51405e\+07 to 1\.21679e\+08"):
            solve(C_ANY, budget)


@pytest.mark.parametrize(
    "costs", [[], [0.0, 1.0], [2.0, 2.0], [2.0, 1.0], [1.0, math.nan], [1.0, math.inf], [math.nan]]
)
def test_invalid_costs_are_refused(costs: list[float]) -> None:
    with pytest.raises(ValueError, match="strictly increasing"):
        solve_exit_probability(costs, 1.0)


# --- taking exits


def test_an_image_leaves_at_the_first_exit_it_reaches_the_threshold_of() -> None:
    thresholds = [2.0, 1.0, -math.inf]
    scores = np.array([[2.0, 9.0, 9.0], [1.9, 1.0, 0.0], [0.0, 0.0, 0.0], [math.nan, math.nan, math.nan]])
    assert take_exits(scores, thresholds).tolist() == [0, 1, 2, 2]


def test_outcomes_count_exits_accuracy_and_cost() -> None:
    scores = np.array([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    correct = np.array([[True, False], [True, False], [False, True], [False, True]])
    measured = outcome(scores, correct, [10.0, 30.0], [1.0, -math.inf])
    assert (measured.mean_cost, measured.accuracy, measured.shares) == (20.0, 0.5, (0.5, 0.5))
