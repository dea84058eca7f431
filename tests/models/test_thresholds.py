"""Thresholds: exact quotas and ties, for any scores."""

import math
from collections.abc import Sequence

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.exits import Calibrator, left_by, outcome, outcomes, take_exits
from models.shares import ratio_shares, truncated_geometric_shares

tied_scores = hnp.arrays(np.float64, st.tuples(st.integers(1, 60), st.integers(1, 6)), elements=st.integers(-3, 3))


def distinct_scores(n_images: int, n_exits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_images, n_exits))


def thresholds_for_shares(scores: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    return Calibrator(scores).thresholds(shares)


def released_walk(scores: np.ndarray, shares: list[float]) -> np.ndarray:
    """The published code's calibration, image by image; ours must agree with it without ties and rounding."""
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
    assert thresholds_for_shares(scores[[0, 1, 1, 2]], [0.5, 0.5]).tolist() == [2.0, -np.inf]  # ties leave together


def test_rounding_leaves_no_remainder_for_the_last_exit() -> None:
    scores = distinct_scores(100, 5)
    counts = np.bincount(take_exits(scores, thresholds_for_shares(scores, [0.199] * 4 + [0.204])), minlength=5)
    assert counts.tolist() == [19, 20, 20, 20, 21]  # flooring each share would give 19 19 19 19 24


def test_shares_that_add_up_to_whole_images_are_those_images() -> None:
    """Ten tenths, of which eight add up to a little less than 0.8."""
    scores = distinct_scores(10, 10)
    assert np.bincount(take_exits(scores, thresholds_for_shares(scores, [0.1] * 10))).tolist() == [1] * 10


def test_adjacent_floats_are_distinguished() -> None:
    scores = np.array([[np.nextafter(1.0, 2.0), 0.0], [1.0, 0.0]])
    assert take_exits(scores, thresholds_for_shares(scores, [0.5, 0.5])).tolist() == [0, 1]


def test_ties_all_leave_and_later_exits_keep_to_the_plan() -> None:
    scores = distinct_scores(1000, 4)
    scores[:300, 0] = 50.0  # like a saturated float32 softmax; the plan is 100 per exit except the last
    counts = np.bincount(take_exits(scores, thresholds_for_shares(scores, [0.1, 0.1, 0.2, 0.6])), minlength=4)
    assert counts.tolist() == [300, 0, 100, 600]


def test_ties_that_empty_the_set_do_not_send_new_images_to_the_last_exit() -> None:
    scores = distinct_scores(100, 3)
    scores[:, 0] = 1.0
    thresholds = thresholds_for_shares(scores, [0.1, 0.1, 0.8])
    assert thresholds.tolist() == [1.0, -np.inf, -np.inf]
    walked = released_walk(scores, [0.1, 0.1, 0.8])
    assert walked[1] == np.inf  # in the published code, other images never leave at this exit


def test_everything_leaves_where_the_shares_say_so() -> None:
    scores = distinct_scores(50, 3)
    assert thresholds_for_shares(scores, [1.0, 0.0, 0.0]).tolist() == [-np.inf] * 3
    assert thresholds_for_shares(scores, [0.0, 1.0, 0.0]).tolist() == [np.inf, -np.inf, -np.inf]
    assert thresholds_for_shares(scores[:, :1], [1.0]).tolist() == [-np.inf]


@given(tied_scores, st.floats(0, 1), st.floats(0, 1))
def test_with_ties_no_image_leaves_later_than_planned(scores: np.ndarray, p: float, q: float) -> None:
    n_images, n_exits = scores.shape
    for shares in (truncated_geometric_shares(p, n_exits), ratio_shares(2 * q, n_exits)):
        exits = take_exits(scores, thresholds_for_shares(scores, shares))
        gone_by = np.cumsum(np.bincount(exits, minlength=n_exits))
        assert (gone_by >= np.floor(n_images * np.cumsum(shares) + 1e-9)).all()


@given(st.integers(0, 10), st.integers(1, 200), st.integers(1, 6), st.floats(0, 2), st.floats(0, 2))
def test_without_ties_cumulative_exits_fall_with_the_ratio(
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
def test_invalid_shares_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        thresholds_for_shares(np.zeros((4, 2)), shares)


@pytest.mark.parametrize("scores", [np.zeros(4), np.zeros((0, 2)), np.array([[1.0, np.nan]])])
def test_scores_that_cannot_be_ranked_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scores must"):
        thresholds_for_shares(scores, [0.5, 0.5])


@given(tied_scores, st.data())
def test_measuring_many_threshold_vectors_equals_measuring_each(scores: np.ndarray, data: st.DataObject) -> None:
    n_exits = scores.shape[1]
    n_points = data.draw(st.integers(1, 6))
    steps = hnp.arrays(np.float64, (n_points, n_exits), elements=st.one_of(st.integers(-4, 4), st.just(math.inf)))
    thresholds = np.sort(data.draw(steps), axis=0)
    thresholds[:, -1] = -math.inf
    correct = data.draw(hnp.arrays(np.bool_, scores.shape))
    costs = list(range(1, n_exits + 1))
    assert outcomes(scores, correct, costs, thresholds) == [outcome(scores, correct, costs, row) for row in thresholds]
    left = left_by(scores, thresholds)
    for p, row in enumerate(thresholds):
        assert np.array_equal((left > p).argmax(axis=1), take_exits(scores, row))
