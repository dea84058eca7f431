"""Exit scores, shares and thresholds: reference figures, exact quotas, and rules that hold for any scores."""

import math
from itertools import pairwise

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.exits import (
    SCORES,
    confidence,
    expected_cost,
    outcome,
    ratio_shares,
    solve_exit_probability,
    solve_ratio,
    take_exits,
    thresholds_for_budget,
    thresholds_for_shares,
    truncated_geometric_shares,
)

C_ANY = [15140452, 25505992, 37788460, 52061840, 62181620, 74070872, 87729596, 100038944, 110121860, 121679336]

costs_cumulative = st.lists(st.floats(0.1, 100), min_size=1, max_size=8).map(lambda parts: list(np.cumsum(parts)))
tied_scores = hnp.arrays(np.float64, st.tuples(st.integers(1, 60), st.integers(1, 6)), elements=st.integers(-3, 3))
logits = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 40), st.sampled_from([2, 3, 10, 100])), elements=st.floats(-60, 60, width=32)
)


def distinct_scores(n_images: int, n_exits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_images, n_exits))


def released_walk(scores: np.ndarray, shares: list[float]) -> np.ndarray:
    """The published code's calibration, image by image; ours must agree with it where nothing ties or rounds."""
    n_images, n_exits = scores.shape
    gone, thresholds = set[int](), np.full(n_exits, np.inf)
    for n in range(n_exits - 1):
        n_leaving, n_counted = math.floor(n_images * shares[n]), 0
        for image in sorted(range(n_images), key=lambda i: -scores[i, n]):
            if image not in gone and n_leaving:
                n_counted += 1
                if n_counted == n_leaving:
                    thresholds[n] = scores[image, n]
                    break
        gone |= {i for i in range(n_images) if scores[i, n] >= thresholds[n]}
    thresholds[-1] = -np.inf
    return thresholds


# --- scores


def test_scores_of_a_known_row() -> None:
    row = np.log(np.array([[0.7, 0.2, 0.1]], dtype=np.float32))
    assert SCORES["max_softmax"](row) == pytest.approx(math.log(0.7 / 0.3), abs=1e-6)
    assert SCORES["logit_margin"](row) == pytest.approx(math.log(0.7 / 0.2), abs=1e-6)
    assert confidence(row) == pytest.approx(0.7, abs=1e-6)


def test_log_odds_rank_what_the_softmax_maximum_cannot() -> None:
    rows = np.array([[40.0, 0.0, 0.0], [41.0, 0.0, 0.0], [900.0, 0.0, -900.0]], dtype=np.float32)
    assert (
        np.exp(rows - rows.max(1, keepdims=True)).max(1) / np.exp(rows - rows.max(1, keepdims=True)).sum(1) == 1
    ).all()
    scores = SCORES["max_softmax"](rows)
    assert scores == pytest.approx([40 - math.log(2), 41 - math.log(2), 900], abs=1e-9)


@given(logits)
def test_log_odds_are_the_log_odds_of_the_confidence(rows: np.ndarray) -> None:
    largest = confidence(rows)
    assert ((largest > 0) & (largest <= 1)).all()
    assert 1 / (1 + np.exp(-SCORES["max_softmax"](rows))) == pytest.approx(largest, rel=1e-9)


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


def test_scores_leave_their_input_alone() -> None:
    rows = np.array([[1.0, 3.0, 2.0]])
    for score in [*SCORES.values(), confidence]:
        score(rows)
    assert rows.tolist() == [[1.0, 3.0, 2.0]]


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [np.inf, np.inf], [-np.inf, -np.inf]])
def test_logits_that_are_not_finite_are_never_sure(bad: list[float]) -> None:
    rows = np.array([[2.0, 1.0], bad], dtype=np.float32)
    for score in SCORES.values():
        assert score(rows).tolist() == [pytest.approx(1.0), -np.inf]
    assert confidence(rows)[1] == 0.0


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
    assert expected_cost(0.0, C_ANY) == C_ANY[-1]
    assert expected_cost(1.0, C_ANY) == C_ANY[0]
    assert solve_exit_probability(C_ANY, C_ANY[0]) == 1.0
    assert solve_exit_probability(C_ANY, C_ANY[-1]) == 0.0
    assert solve_ratio(C_ANY, C_ANY[0]) == pytest.approx(0.0, abs=1e-6)
    assert solve_ratio(C_ANY, C_ANY[-1]) == math.inf


@given(costs_cumulative, st.floats(0, 1))
def test_every_budget_has_its_root(costs: list[float], fraction: float) -> None:
    budget = min(max(costs[0] + fraction * (costs[-1] - costs[0]), costs[0]), costs[-1])
    p, ratio = solve_exit_probability(costs, budget), solve_ratio(costs, budget)
    assert expected_cost(p, costs) == pytest.approx(budget, rel=1e-9)
    assert truncated_geometric_shares(p, len(costs)) @ costs == pytest.approx(budget, rel=1e-9)
    assert ratio_shares(ratio, len(costs)) @ costs == pytest.approx(budget, rel=1e-6)


@given(costs_cumulative, st.floats(0, 1), st.floats(0, 1))
def test_cost_falls_with_the_exit_probability(costs: list[float], p: float, q: float) -> None:
    assert expected_cost(min(p, q), costs) >= expected_cost(max(p, q), costs) * (1 - 1e-12)


@given(st.floats(0, 1), st.floats(0, 1e6), st.integers(1, 12))
def test_shares_are_shares(p: float, ratio: float, n_exits: int) -> None:
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
def test_costs_that_make_no_sense_are_refused(costs: list[float]) -> None:
    with pytest.raises(ValueError, match="strictly increasing"):
        solve_exit_probability(costs, 1.0)


# --- thresholds for shares


@pytest.mark.parametrize("shares", [[0.3, 0.2, 0.1, 0.4], [0.25] * 4, [0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]])
def test_quotas_are_exact_without_ties_and_agree_with_the_released_walk(shares: list[float]) -> None:
    scores = distinct_scores(1000, 4)
    thresholds = thresholds_for_shares(scores, shares)
    exits = take_exits(scores, thresholds)
    assert np.bincount(exits, minlength=4).tolist() == [round(1000 * share) for share in shares]
    assert np.array_equal(exits, take_exits(scores, released_walk(scores, shares)))


def test_a_threshold_lies_between_the_last_to_leave_and_the_best_to_stay() -> None:
    scores = np.array([[4.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert thresholds_for_shares(scores, [0.5, 0.5]).tolist() == [2.0, -np.inf]


def test_rounding_leaves_no_remainder_for_the_last_exit() -> None:
    scores = distinct_scores(100, 5)
    counts = np.bincount(take_exits(scores, thresholds_for_shares(scores, [0.199] * 4 + [0.204])), minlength=5)
    assert counts.tolist() == [19, 20, 20, 20, 21]  # flooring each share would give 19 19 19 19 24


def test_ties_all_leave_and_the_exits_after_them_keep_to_the_plan() -> None:
    scores = distinct_scores(1000, 4)
    scores[:300, 0] = 50.0  # as a saturated float32 softmax does; the plan is 100 an exit but the last
    counts = np.bincount(take_exits(scores, thresholds_for_shares(scores, [0.1, 0.1, 0.2, 0.6])), minlength=4)
    assert counts.tolist() == [300, 0, 100, 600]


def test_ties_that_empty_the_set_do_not_send_new_images_to_the_last_exit() -> None:
    scores = distinct_scores(100, 3)
    scores[:, 0] = 1.0
    thresholds = thresholds_for_shares(scores, [0.1, 0.1, 0.8])
    assert thresholds.tolist() == [1.0, -np.inf, -np.inf]
    walked = released_walk(scores, [0.1, 0.1, 0.8])
    assert walked[1] == np.inf  # the silent blow-up of the published code, for images unlike these


def test_everything_leaves_where_the_shares_say_so() -> None:
    scores = distinct_scores(50, 3)
    assert thresholds_for_shares(scores, [1.0, 0.0, 0.0]).tolist() == [-np.inf] * 3
    assert thresholds_for_shares(scores, [0.0, 1.0, 0.0]).tolist() == [np.inf, -np.inf, -np.inf]
    assert thresholds_for_shares(scores[:, :1], [1.0]).tolist() == [-np.inf]


@given(tied_scores, st.floats(0, 1), st.floats(0, 1))
def test_under_ties_nobody_leaves_later_than_planned(scores: np.ndarray, p: float, q: float) -> None:
    n_images, n_exits = scores.shape
    for shares in (truncated_geometric_shares(p, n_exits), ratio_shares(2 * q, n_exits)):
        exits = take_exits(scores, thresholds_for_shares(scores, shares))
        gone_by = np.cumsum(np.bincount(exits, minlength=n_exits))
        assert (gone_by >= np.floor(n_images * np.cumsum(shares) + 1e-9)).all()


@given(st.integers(0, 10), st.integers(1, 200), st.integers(1, 6), st.floats(0, 2), st.floats(0, 2))
def test_without_ties_images_gone_by_each_exit_fall_with_the_ratio(
    seed: int, n_images: int, n_exits: int, one: float, other: float
) -> None:
    scores = distinct_scores(n_images, n_exits, seed)
    gone = [
        np.cumsum(
            np.bincount(take_exits(scores, thresholds_for_shares(scores, ratio_shares(r, n_exits))), minlength=n_exits)
        )
        for r in sorted((one, other))
    ]
    assert (gone[0] >= gone[1]).all()


def test_scores_that_are_minus_infinity_leave_last() -> None:
    scores = np.array([[2.0, 0.0], [1.0, 0.0], [-np.inf, 0.0], [-np.inf, 0.0]])
    assert take_exits(scores, thresholds_for_shares(scores, [0.5, 0.5])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("shares", [[0.5, 0.6], [1.0], [1.5, -0.5], [math.nan, 1.0]])
def test_shares_that_are_none_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        thresholds_for_shares(np.zeros((4, 2)), shares)


@pytest.mark.parametrize("scores", [np.zeros(4), np.zeros((0, 2)), np.array([[1.0, np.nan]])])
def test_scores_that_cannot_be_ranked_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scores must"):
        thresholds_for_shares(scores, [0.5, 0.5])


# --- taking exits


def test_an_image_leaves_at_the_first_exit_it_reaches_the_threshold_of() -> None:
    thresholds = [2.0, 1.0, -math.inf]
    scores = np.array([[2.0, 9.0, 9.0], [1.9, 1.0, 0.0], [0.0, 0.0, 0.0], [math.nan, math.nan, math.nan]])
    assert take_exits(scores, thresholds).tolist() == [0, 1, 2, 2]


def test_an_outcome_is_what_the_images_did() -> None:
    scores = np.array([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    correct = np.array([[True, False], [True, False], [False, True], [False, True]])
    measured = outcome(scores, correct, [10.0, 30.0], [1.0, -math.inf])
    assert (measured.mean_cost, measured.accuracy, measured.shares) == (20.0, 0.5, (0.5, 0.5))


# --- thresholds for a budget


@given(st.integers(0, 10), st.integers(1, 300), costs_cumulative, st.floats(0, 1))
def test_a_budget_is_met_within_one_image(seed: int, n_images: int, costs: list[float], fraction: float) -> None:
    scores = distinct_scores(n_images, len(costs), seed)
    budget = min(max(costs[0] + fraction * (costs[-1] - costs[0]), costs[0]), costs[-1])
    thresholds = thresholds_for_budget(scores, costs, budget)
    spent = outcome(scores, np.ones(scores.shape, dtype=bool), costs, thresholds).mean_cost
    assert spent <= budget * (1 + 1e-12)
    assert budget - spent <= (costs[-1] - costs[0]) / n_images * (1 + 1e-6)


@given(tied_scores, st.floats(0, 1))
def test_a_budget_is_never_exceeded_under_ties(scores: np.ndarray, fraction: float) -> None:
    costs = [float(n + 1) for n in range(scores.shape[1])]
    budget = costs[0] + fraction * (costs[-1] - costs[0])
    thresholds = thresholds_for_budget(scores, costs, budget)
    assert outcome(scores, np.ones(scores.shape, dtype=bool), costs, thresholds).mean_cost <= budget * (1 + 1e-12)


def test_a_bigger_budget_spends_more() -> None:
    scores = distinct_scores(500, len(C_ANY))
    correct = np.ones(scores.shape, dtype=bool)
    spent = [
        outcome(scores, correct, C_ANY, thresholds_for_budget(scores, C_ANY, budget)).mean_cost
        for budget in np.linspace(C_ANY[0], C_ANY[-1], 20)
    ]
    assert all(a < b for a, b in pairwise(spent))
    assert spent[0] == C_ANY[0]
    assert spent[-1] == C_ANY[-1]


def test_costs_must_match_the_scores() -> None:
    with pytest.raises(ValueError, match="one cost an exit"):
        thresholds_for_budget(np.zeros((3, 2)), [1.0, 2.0, 3.0], 2.0)
