"""Choosing the exit policy: noise does not mislead the choice, and test images do not affect it."""

import numpy as np
import pytest

from models.predictor import FEATURES, Predictor
from training.calibration import ExitOutputs
from training.comparison import N_COSTS, N_RESAMPLES, Behaviour, behaviour, compare, lead_at, resamples
from training.policies import N_HALVINGS, PAPER, Policy, choose, crossfit_rightness, fit_scores, source_of
from training.predicting import FITTED, crossfit, fit_as_good, fit_expected_gain, logistic_regression

COSTS = (10.0, 20.0, 40.0)
BUDGETS = np.linspace(10, 40, 7).tolist()
MARGIN = FEATURES.index("logit_margin")


def rightness_of(scores: np.ndarray, correct: np.ndarray) -> dict[str, np.ndarray]:
    return crossfit_rightness(lambda fitted, judged: (scores[fitted], scores[judged]), correct, COSTS, BUDGETS)


def test_crossfitting_finds_no_benefit_in_a_noise_score() -> None:
    draw = np.random.default_rng(0)
    correct = draw.random((400, 3)) < [0.5, 0.6, 0.7]
    noise = rightness_of(draw.normal(size=(400, 3)), correct)
    knows = rightness_of(np.where(correct, 1.0, 0.0) + 0.01 * draw.random((400, 3)), correct)
    for family, right in noise.items():
        assert right.shape == (400,)
        # Exits at random are no better than a mixture of the exits, whose accuracy is between theirs.
        assert correct[:, 0].mean() - 0.02 < right.mean() < correct[:, 2].mean() + 0.02
        assert knows[family].mean() > right.mean() + 0.05


def test_no_image_is_judged_by_thresholds_from_its_own_half() -> None:
    draw = np.random.default_rng(0)
    scores, correct = draw.normal(size=(51, 3)), draw.random((51, 3)) < 0.5
    n_judged = np.zeros(51, int)

    def source(fitted: np.ndarray, judged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert sorted([*fitted, *judged]) == list(range(51))
        assert len(fitted) in (25, 26)
        n_judged[judged] += 1
        return scores[fitted], scores[judged]

    crossfit_rightness(source, correct, COSTS, BUDGETS)
    assert n_judged.tolist() == [N_HALVINGS] * 51


def test_what_a_half_spends_beside_the_budget_is_corrected() -> None:
    """If all are wrong at exit 1 and right at exit 2, accuracy is the share of the way that the cost has gone."""
    scores, correct = np.random.default_rng(1).normal(size=(300, 2)), np.tile([False, True], (300, 1))
    budgets = [14.0, 17.0, 24.0]  # shares 0.2, 0.35 and 0.7; the other half spends a little more or less
    rightness = crossfit_rightness(lambda a, b: (scores[a], scores[b]), correct, (10.0, 30.0), budgets)
    for family, right in rightness.items():
        assert right.mean() == pytest.approx((0.2 + 0.35 + 0.7) / 3, abs=1e-9), family


def test_a_lead_within_one_standard_error_does_not_move_the_choice() -> None:
    draw = np.random.default_rng(1)
    paper, better, lucky = PAPER, Policy("logit_margin", "ratio"), Policy("entropy", "geometric")
    base = draw.random(1000)
    rightness = {
        paper: base,
        better: base + 0.004 + 0.05 * draw.normal(size=1000),
        lucky: base + draw.normal(size=1000),
    }
    rightness[lucky] += 0.02 - (rightness[lucky] - base).mean()  # a lead of two points with a standard error of three
    assert choose(rightness) == better
    assert choose({paper: base, lucky: rightness[lucky]}) == paper


def test_fitted_and_stateful_scores_must_be_significantly_better_than_plain_ones() -> None:
    draw = np.random.default_rng(2)
    base = draw.random(1000)
    plain, fitted = Policy("logit_margin", "ratio"), Policy("as_good", "ratio")
    rightness = {PAPER: base, plain: base + 0.01 + 0.01 * draw.normal(size=1000)}
    noise = draw.normal(size=1000)
    noise -= noise.mean()
    assert choose({**rightness, fitted: rightness[plain] + 0.002 + 0.1 * noise}) == plain  # a standard error of 0.003
    assert choose({**rightness, fitted: rightness[plain] + 0.004 + 0.1 * noise}) == fitted

    # More consistent, so its lead over the paper's has a smaller error, but it is no better than the plain one.
    sign = np.where(np.arange(1000) % 2, 1.0, -1.0)
    rough, steady = (
        {PAPER: base, plain: base + 0.1 + 0.6 * sign},
        base + 0.1 + 0.3 * np.roll(np.repeat(sign[:500], 2), 1),
    )
    assert choose({**rough, fitted: steady}) == plain


# --- fitted scores


def features_of_margin(margin: np.ndarray) -> np.ndarray:
    features = np.zeros((*margin.shape, len(FEATURES)), dtype=np.float32)
    features[:, :, MARGIN] = margin
    return features


def test_logistic_regression_recovers_the_true_weights() -> None:
    draw = np.random.default_rng(2)
    x = draw.normal(size=(40_000, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, 0.0]
    log_odds = 0.8 * x[:, 0] - 0.15 * x[:, 1] + 4.0 * x[:, 2] + 0.3
    happens = draw.random(len(x)) < 1 / (1 + np.exp(-log_odds))
    assert logistic_regression(x, happens) == pytest.approx([0.8, -0.15, 4.0, 0.3], rel=0.1, abs=0.05)


@pytest.mark.parametrize("kind", ["separable", "constant", "never", "huge", "missing", "none"])
def test_logistic_regression_is_finite_for_degenerate_data(kind: str) -> None:
    x = np.random.default_rng(3).normal(size=(50, 2))
    happens = x[:, 0] > 0
    if kind == "constant":
        x = np.ones((50, 2))
    elif kind == "never":
        happens = np.zeros(50, dtype=bool)
    elif kind == "huge":
        x *= 1e6
    elif kind == "missing":
        x[::3, 1] = -np.inf
    elif kind == "none":
        x[:] = np.nan
    weights = logistic_regression(x, happens)
    assert np.isfinite(weights).all()
    if kind in ("separable", "huge"):
        assert (((x @ weights[:-1] + weights[-1]) > 0) == happens).mean() > 0.95


def heads(n_images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features and correctness of three heads whose margins predict whether they are right."""
    draw = np.random.default_rng(seed)
    ease = draw.normal(size=(n_images, 1))
    correct = ease + 0.5 * draw.normal(size=(n_images, 3)) + [0.0, 0.4, 0.8] > 0
    return features_of_margin(ease + 0.3 * draw.normal(size=(n_images, 3))), correct


def test_fitted_scores_are_calibrated_on_other_images() -> None:
    (features, correct), (other, other_correct) = heads(8000, 4), heads(8000, 5)
    as_good = fit_as_good(features, correct).of_all_features(other)
    gain = fit_expected_gain(features, correct).of_all_features(other)
    for i in (0, 1):
        stop = other_correct[:, i] | ~other_correct[:, i + 1 :].any(axis=1)
        assert (1 / (1 + np.exp(-as_good[:, i]))).mean() == pytest.approx(stop.mean(), abs=0.02)
        lost = other_correct[:, i].astype(float) - other_correct[:, -1]
        assert gain[:, i].mean() == pytest.approx(lost.mean(), abs=0.02)
        sure = gain[:, i] > np.median(gain[:, i])
        assert lost[sure].mean() > lost[~sure].mean() + 0.02
    assert not as_good[:, 2].any()


@pytest.mark.parametrize("name", FITTED)
def test_crossfitted_scores_do_not_depend_on_an_images_own_answers(name: str) -> None:
    features, correct = heads(60, 6)
    before = crossfit(name, features, correct)
    image = int(np.flatnonzero(~correct[:, 0] & correct[:, 2])[0])
    changed = correct.copy()
    changed[image] = ~changed[image]
    after = crossfit(name, features, changed)
    assert np.array_equal(before[image], after[image])
    assert not np.array_equal(before, after)
    assert isinstance(FITTED[name](features, correct), Predictor)


# --- on test images


@pytest.mark.parametrize("name", FITTED)
def test_no_score_depends_on_the_images_own_label(name: str) -> None:
    """Both with a predictor fitted on all held-out images, and with one half scored by the other."""
    features, correct = heads(60, 3)
    judged, fitted = np.arange(0, 60, 2), np.arange(1, 60, 2)
    scores_of = source_of(name, outputs_with(features, correct))
    others, scored = scores_of(fitted, judged)
    turned = correct.copy()
    turned[judged] = ~turned[judged]
    again, unmoved = source_of(name, outputs_with(features, turned))(fitted, judged)
    assert np.array_equal(scored, unmoved)
    assert np.array_equal(others, again)
    turned = correct.copy()
    turned[fitted[7]] = ~turned[fitted[7]]
    assert np.array_equal(source_of(name, outputs_with(features, turned))(fitted, judged)[0][7], others[7])
    served = fit_scores(outputs_with(features, correct))[name].heldout
    assert np.array_equal(fit_scores(outputs_with(features, turned))[name].heldout[fitted[7]], served[fitted[7]])
    assert not np.array_equal(fit_scores(outputs_with(features, turned))[name].heldout, served)


def outputs_with(features: np.ndarray, correct: np.ndarray) -> ExitOutputs:
    labels = np.zeros(len(correct), np.int64)
    return ExitOutputs(labels, np.where(correct, 0, 1), correct, correct, {}, features)


def test_policies_are_compared_at_equal_measured_cost() -> None:
    """A policy that spends twice its budget is no better at equal cost."""
    features, correct = heads(3000, 7)
    scores = features[:, :, MARGIN]
    cuts = np.quantile(scores[:, 0], np.linspace(0, 1, 30)).tolist()
    rows = np.array([(cut, cut, -np.inf) for cut in cuts])
    other = Policy("logit_margin", "geometric")
    lavish = behaviour(scores, correct, COSTS, rows[[0, *range(9, 30)]])
    shares = np.array([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    both = {PAPER: behaviour(scores, correct, COSTS, rows), other: lavish}
    compared = compare(both, other, shares, correct, COSTS)
    lead = compared.of(other)
    assert len(compared.costs_mflops) == N_COSTS
    dear = [cost > lavish.costs.mean(axis=0)[1] for cost in compared.costs_mflops]
    assert [d.mean for d, is_dear in zip(lead.lead, dear, strict=True) if is_dear] == pytest.approx(
        [0] * sum(dear), abs=1e-3
    )
    assert compared.of(PAPER).mean_lead.mean == compared.of(PAPER).mean_lead.error == 0
    # Leads are those on the images themselves; resamples only give their spread.
    measured = np.subtract(lead.accuracy, compared.of(PAPER).accuracy)
    assert [at_cost.mean for at_cost in lead.lead] == pytest.approx(measured.tolist(), abs=1e-12)
    assert lead.mean_lead.mean == pytest.approx(measured.mean())


def test_one_operating_point_is_compared_at_the_cost_that_it_has() -> None:
    """Between exit 1 for all, 40 % right, and the last exit for all, 80 % right, a third of the way is 53.3 %."""
    correct = np.arange(300)[:, None] % 10 < [4, 6, 8]
    ends = Behaviour.of_exits(np.tile([0, 2], (300, 1)), correct, COSTS)
    second = Behaviour.of_exits(np.ones((300, 1), np.intp), correct, COSTS)
    assert lead_at(second, ends).mean == pytest.approx(0.6 - (0.4 + 0.4 / 3))
    assert lead_at(Behaviour.of_exits(np.full((300, 1), 2), correct, COSTS), ends).mean == pytest.approx(0)


def test_paired_intervals_match_theory() -> None:
    """For two policies of the same cost, the error of the lead is that of a paired difference."""
    draw = np.random.default_rng(8)
    n_images = 4000
    correct = np.stack([draw.random(n_images) < 0.7] * 3, axis=1)
    better = correct | (draw.random((n_images, 1)) < 0.05)
    scores, rows = np.zeros((n_images, 3)), np.array([(-np.inf,) * 3, (np.inf, -np.inf, -np.inf)])
    other = Policy("logit_margin", "geometric")
    both = {PAPER: behaviour(scores, correct, COSTS, rows), other: behaviour(scores, better, COSTS, rows)}
    compared = compare(both, other, np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), correct, COSTS)
    lead = compared.of(other).mean_lead
    difference = better[:, 0].astype(float) - correct[:, 0]
    error = difference.std() / np.sqrt(n_images)
    assert lead.mean == pytest.approx(difference.mean(), abs=1e-6)
    assert lead.error == pytest.approx(error, rel=0.15)
    assert (lead.high - lead.low) == pytest.approx(2 * 1.96 * lead.error, rel=0.05)
    single = compared.of(PAPER).error[0]
    assert single == pytest.approx(correct[:, 0].std() / np.sqrt(n_images), rel=0.15)
    assert lead.error < single


def test_every_resample_has_as_many_images_as_the_set() -> None:
    weights = resamples(100)
    assert weights.shape == (1 + N_RESAMPLES, 100)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 100).all()
    assert weights[1:].var() == pytest.approx(1.0, abs=0.1)
