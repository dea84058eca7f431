"""JEI-DNN's exit model compared with its definition, and the score that represents it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.exits import entropy, max_softmax, probability_margin, take_exits
from models.gates import (
    GATE_FEATURES,
    PUBLISHED_THRESHOLD,
    GateScore,
    exit_probabilities,
    gate_scores,
    see_softmax,
)
from models.predictor import linear_log_odds
from models.scores import score_exits

N_EXITS, N_CLASSES = 5, 7


def logits_of(n_rows: int, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    shared = 2.0 * draw.normal(size=(n_rows, N_CLASSES))
    return [(shared + draw.normal(size=shared.shape)).astype(np.float32) for _ in range(N_EXITS)]


def weights_of(seed: int, spread: float = 2.0, bias: float = 0.0) -> np.ndarray:
    weights = np.random.default_rng(seed).normal(scale=spread, size=(N_EXITS, len(GATE_FEATURES) + 1))
    weights[:, -1] += bias
    weights[-1] = 0
    return weights


def published(weights: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P(exit at l) and pi_l [rows, N - 1], computed row by row from the definition."""
    probabilities, decisions = [], []
    for row in features:
        gates = [1 / (1 + np.exp(-linear_log_odds(weights[i], row[None, i])[0])) for i in range(N_EXITS - 1)]
        p = [max(0.0, min(g, 1.0 - sum(gates[:i]))) for i, g in enumerate(gates)]
        pi: list[float] = []
        for i in range(N_EXITS - 1):
            still_there = float(np.prod([1 - x for x in pi]))
            pi.append(min(1.0, max(0.0, p[i] / still_there)) if still_there > 1e-12 else 1.0)
        probabilities.append(p)
        decisions.append(pi)
    return np.array(probabilities), np.array(decisions)


def test_a_gate_sees_the_softmax_of_its_head() -> None:
    logits = logits_of(30)[0].astype(np.float64)
    by_name = dict(zip(GATE_FEATURES, see_softmax(logits).T, strict=True))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    squared = p**2 / (p**2).sum(axis=1, keepdims=True)
    assert by_name["confidence"] == pytest.approx(p.max(axis=1))
    assert by_name["confidence"] == pytest.approx(1 / (1 + np.exp(-max_softmax(logits))))
    assert by_name["entropy"] == pytest.approx(-(p * np.log(p)).sum(axis=1))
    assert by_name["entropy"] == pytest.approx(-entropy(logits))
    assert by_name["probability_margin"] == pytest.approx(1 + probability_margin(logits))
    assert by_name["powered_entropy"] == pytest.approx(-(squared * np.log(squared)).sum(axis=1))


def test_gate_inputs_for_extreme_and_infinite_logits() -> None:
    logits = np.array([[0.0, -1e30, 3e38], [-np.inf, 0, 1], [5e4, 5e4, 5e4]], np.float32)
    features = see_softmax(logits)
    assert features[0] == pytest.approx([1, 0, 1, 0])
    assert np.isnan(features[1]).all()
    assert features[2] == pytest.approx([1 / 3, np.log(3), 0, np.log(3)])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), spread=st.floats(0.1, 30.0), bias=st.floats(-10.0, 10.0))
def test_exit_probabilities_sum_to_one_and_exits_are_as_published(seed: int, spread: float, bias: float) -> None:
    weights, logits = weights_of(seed, spread, bias), logits_of(40, seed)
    features = np.stack([see_softmax(x) for x in logits], axis=1)
    probabilities = exit_probabilities(weights, features)
    expected, pi = published(weights, features)
    assert (probabilities >= 0).all()
    assert (probabilities[:, :-1].sum(axis=1) <= 1 + 1e-12).all()
    assert probabilities.sum(axis=1) == pytest.approx(1.0)  # the last exit takes the rest
    assert probabilities[:, :-1] == pytest.approx(expected, abs=1e-12)

    scores = score_exits(GateScore(weights), logits)
    assert np.array_equal(scores, gate_scores(weights, features))
    thresholds = np.array([PUBLISHED_THRESHOLD] * (N_EXITS - 1) + [-np.inf])
    leaves = np.concatenate([pi >= 0.5, np.ones((len(pi), 1), bool)], axis=1)
    clear = (np.abs(pi - 0.5) > 1e-9).all(axis=1)
    assert np.array_equal(take_exits(scores, thresholds)[clear], leaves.argmax(axis=1)[clear])


def test_the_score_is_log_pi_and_still_ranks_images_where_pi_rounds_to_one() -> None:
    weights, logits = weights_of(3, 1.0, 1.0), logits_of(400, 3)
    features = np.stack([see_softmax(x) for x in logits], axis=1)
    scores, (_, pi) = gate_scores(weights, features), published(weights, features)
    below = pi < 1 - 1e-9  # 1 after rounding
    assert scores[:, :-1][below] == pytest.approx(np.log(pi[below]))
    certain = ~below[:, 1] & below[:, 0]
    assert certain.sum() > 50
    assert (scores[certain, 1] >= -1e-8).all()
    assert len(np.unique(scores[certain, 1])) == certain.sum()


@pytest.mark.parametrize("weights", [np.zeros((3, 4)), np.zeros((0, 5)), np.full((3, 5), np.inf), np.zeros(5)])
def test_weights_that_do_not_fit_are_refused(weights: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        GateScore(weights)
