"""Scores as the server uses them: one interface, whether or not a score depends on earlier exits."""

import numpy as np
import pytest

from models.exits import SCORES, confidence, logit_margin
from models.gates import GATE_FEATURES, GateScore
from models.predictor import FEATURES, Predictor, features_of
from models.scores import HeadScore, Patience, Score, Vote, plain_scores, score_exits

N_EXITS, N_CLASSES = 5, 6


def logits_of(n_rows: int, seed: int = 0) -> np.ndarray:
    """Logits [N, rows, classes] of heads that mostly agree."""
    draw = np.random.default_rng(seed)
    shared = 2.0 * draw.normal(size=(n_rows, N_CLASSES))
    return (shared + draw.normal(size=(N_EXITS, n_rows, N_CLASSES))).astype(np.float32)


def all_scores() -> dict[str, Score]:
    weights = np.random.default_rng(1).normal(size=(2, N_EXITS, len(FEATURES) + 1))
    return {
        **plain_scores(N_EXITS),
        "as_good": Predictor(weights[0]),
        "expected_gain": Predictor(weights[0], weights[1]),
        "jei_gates": GateScore(weights[0][:, : len(GATE_FEATURES) + 1] - 1.0),
    }


@pytest.mark.parametrize("name", all_scores())
def test_rows_may_be_regrouped_if_each_keeps_its_history(name: str) -> None:
    """Bit for bit, with rows leaving at every exit, as in the server."""
    score, logits = all_scores()[name], logits_of(60)
    expected = score_exits(score, logits)
    assert expected.dtype == np.float64
    assert expected.shape == (60, N_EXITS)
    draw = np.random.default_rng(2)
    here, history = np.arange(60), score.start(60)
    assert history.shape == (60, score.history_width)
    for exit_index in range(N_EXITS):
        parts = np.split(draw.permutation(len(here)), sorted(draw.integers(1, len(here), 3)))
        scored, carried = np.empty(len(here)), np.empty_like(history)
        for part in parts:
            before = history[part].copy()
            scored[part], carried[part] = score(exit_index, logits[exit_index, here[part]], before)
            assert np.array_equal(before, history[part])  # not modified
        assert np.array_equal(scored, expected[here, exit_index])
        stays = draw.random(len(here)) < 0.8
        here, history = here[stays], carried[stays]


@pytest.mark.parametrize("name", all_scores())
def test_non_finite_logits_are_never_confident_and_do_not_affect_later_exits(name: str) -> None:
    score, logits = all_scores()[name], logits_of(8)
    logits[1, 2, 3], logits[2, 5] = np.nan, np.inf
    scores = score_exits(score, logits)
    assert np.isneginf(scores[2, 1])
    assert np.isneginf(scores[5, 2])
    assert np.isfinite(np.delete(scores, [2, 5], axis=0)).all()
    assert np.isfinite(scores[2, 2:]).all()
    assert np.isfinite(scores[5, 3:]).all()


def test_scores_of_one_head_are_those_of_exits() -> None:
    logits = logits_of(9)
    for name, function in SCORES.items():
        assert np.array_equal(
            score_exits(plain_scores(N_EXITS)[name], logits), np.stack([function(x) for x in logits], 1)
        )


@pytest.mark.parametrize("name", SCORES)
def test_the_servers_single_pass_equals_the_separate_functions(name: str) -> None:
    rows = logits_of(40)[0]
    rows[3, 2] = np.nan
    classes, confidences, scores = HeadScore(SCORES[name]).read(rows)
    assert np.array_equal(classes, rows.argmax(axis=1))
    np.testing.assert_allclose(confidences, confidence(rows), rtol=1e-14)
    assert np.array_equal(scores, HeadScore(SCORES[name])(0, rows, np.zeros((40, 0)))[0])


def rows_answering(*classes: int) -> np.ndarray:
    """Logits [N, 1, 3] of one row that predicts these classes, one per exit, with the same margin."""
    return 2.0 * np.eye(3, dtype=np.float32)[list(classes)][:, None]


def test_patience_counts_agreement_in_a_row() -> None:
    scores = score_exits(Patience(), rows_answering(0, 0, 1, 1, 1))[0]
    assert np.floor(scores).tolist() == [0, 1, 0, 1, 2]
    assert scores - np.floor(scores) == pytest.approx(2 / 3)  # the margin of 2 breaks ties


def test_vote_is_the_share_of_the_most_common_answer() -> None:
    scores = score_exits(Vote(5), rows_answering(0, 1, 1, 2, 1))[0]
    ties = (2 / 3) / np.arange(1, 6)
    assert scores - ties == pytest.approx([1, 1 / 2, 2 / 3, 2 / 4, 3 / 5])


def test_margins_only_break_ties_between_votes() -> None:
    logits = logits_of(2000)
    for score, unit in ((Patience(), 1.0), (Vote(N_EXITS), 1 / 4)):
        at_exit_4 = score_exits(score, logits)[:, 3]
        counts = np.floor(at_exit_4 / unit + 1e-9)
        margins = logit_margin(logits[3])
        for count in np.unique(counts):
            same = counts == count
            assert np.array_equal(np.argsort(at_exit_4[same], kind="stable"), np.argsort(margins[same], kind="stable"))


def test_the_features_of_a_predictor() -> None:
    logits = logits_of(50)
    features = features_of(logits)
    assert features.shape == (50, N_EXITS, len(FEATURES))
    by_name = {name: features[:, :, i] for i, name in enumerate(FEATURES)}
    classes, margin = logits.argmax(axis=2).T, np.stack([logit_margin(x) for x in logits], axis=1)
    agrees = classes[:, 1:] == classes[:, :-1]
    assert 0 < agrees.mean() < 1
    assert np.array_equal(by_name["logit_margin"], margin)
    assert np.array_equal(by_name["agrees"][:, 1:], agrees)
    assert np.array_equal(by_name["previous_logit_margin"][:, 1:], margin[:, :-1])
    assert np.array_equal(by_name["agrees_x_logit_margin"][:, 1:], margin[:, 1:] * agrees)
    assert np.array_equal(by_name["agrees_x_previous_logit_margin"][:, 1:], margin[:, :-1] * agrees)
    for name in FEATURES[1:]:
        assert not by_name[name][:, 0].any()


def test_a_predictor_is_the_log_odds_of_stopping_or_the_expected_loss_of_going_on() -> None:
    logits = logits_of(40)
    weights = np.random.default_rng(3).normal(size=(2, N_EXITS, len(FEATURES) + 1)) * 0.3
    features = features_of(logits)
    helps, harms = (np.einsum("mnf,nf->mn", features, w[:, :-1]) + w[:, -1] for w in weights)
    assert score_exits(Predictor(weights[0]), logits) == pytest.approx(-helps)
    expected = 1 / (1 + np.exp(-harms)) - 1 / (1 + np.exp(-helps))
    predictor = Predictor(*weights)
    assert score_exits(predictor, logits) == pytest.approx(expected)
    assert np.array_equal(predictor.of_all_features(features), score_exits(predictor, logits))


@pytest.mark.parametrize(
    ("gain", "loss"),
    [
        (np.zeros((3, len(FEATURES))), None),
        (np.full((3, len(FEATURES) + 1), np.nan), None),
        (np.zeros((0, len(FEATURES) + 1)), None),
        (np.zeros((3, len(FEATURES) + 1)), np.zeros((2, len(FEATURES) + 1))),
    ],
)
def test_weights_that_do_not_fit_are_refused(gain: np.ndarray, loss: np.ndarray | None) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        Predictor(gain, loss)
