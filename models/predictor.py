"""Fitted exit scores: from cheap features of this head and the one before, whether going on is worth it.

What is stored is plain numbers, one row of weights an exit; `training.predicting` fits them. Numpy alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.exits import SCORES, Logits, head_features
from models.shares import Floats

HEAD_FEATURES = tuple(SCORES)
N_HEAD = len(HEAD_FEATURES)
MARGIN = HEAD_FEATURES.index("logit_margin")
FEATURES = (
    *HEAD_FEATURES,
    "agrees",
    *(f"previous_{name}" for name in HEAD_FEATURES),
    "agrees_x_logit_margin",
    "agrees_x_previous_logit_margin",
)
"""What a predictor sees of an exit: how sure this head is, whether the head before gave the same class, how sure that
one was, and two products. At exit 1 there is no head before, and all but the first four are 0."""
HISTORY_WIDTH = 1 + N_HEAD  # the last prediction, and that head's features
NOBODY = -1.0  # the prediction of a head that has not spoken, or whose logits were not finite


def no_history(n_rows: int) -> Floats:
    """Return the histories [n_rows, HISTORY_WIDTH] of rows that have not passed an exit."""
    history = np.zeros((n_rows, HISTORY_WIDTH))
    history[:, 0] = NOBODY
    return history


def see(logits: Logits, history: Floats) -> tuple[Floats, Floats]:
    """Return the features [rows, FEATURES] of one exit's logits [rows, classes], and the rows' new histories.

    The features of rows whose logits are not finite hold -inf.
    """
    head = head_features(logits)
    finite = np.isfinite(head[:, MARGIN])  # each of the four is, or none
    predictions = np.where(finite, logits.argmax(axis=1), NOBODY)
    agrees = (predictions == history[:, 0]) & finite
    features = np.empty((len(head), len(FEATURES)))
    features[:, :N_HEAD] = head
    features[:, N_HEAD] = agrees
    features[:, N_HEAD + 1 : 2 * N_HEAD + 1] = history[:, 1:]
    features[:, -2] = np.where(agrees, head[:, MARGIN], 0.0)
    features[:, -1] = np.where(agrees, history[:, 1 + MARGIN], 0.0)
    new = np.empty_like(history)
    new[:, 0] = predictions
    new[:, 1:] = np.where(finite[:, None], head, 0.0)
    return features, new


def features_of(logits: Sequence[Logits] | NDArray[Any]) -> Floats:
    """Return the features [rows, N, FEATURES] of rows that pass all N exits; logits are [N][rows, classes]."""
    history = no_history(len(logits[0]))
    columns = []
    for at_exit in logits:
        features, history = see(at_exit, history)
        columns.append(features)
    return np.stack(columns, axis=1)


class Predictor:
    """A score that is linear in `FEATURES`, or the difference of two probabilities that are.

    Args:
        gain: [N, FEATURES + 1], the bias last: the log-odds that going on helps, this exit being wrong and a later one
            right. Alone, the score is minus that: how likely stopping is as good as going on.
        loss: [N, FEATURES + 1] or None: the log-odds that going on harms, this exit being right and the last one wrong.
            With it, the score is P(harms) - P(helps): the accuracy that is expected to be lost by going on.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
    """

    history_width = HISTORY_WIDTH

    def __init__(self, gain: NDArray[Any], loss: NDArray[Any] | None = None) -> None:
        self.gain = np.asarray(gain, dtype=np.float64)
        self.loss = None if loss is None else np.asarray(loss, dtype=np.float64)
        for weights in (self.gain, self.gain if self.loss is None else self.loss):
            shape = (len(self.gain), len(FEATURES) + 1)
            if weights.shape != shape or not len(weights) or not np.isfinite(weights).all():
                raise ValueError(
                    f"a predictor's weights must be finite numbers [exits, {shape[1]}], as many for loss as for gain, "
                    f"not {weights.shape}"
                )

    def start(self, n_rows: int) -> Floats:
        return no_history(n_rows)

    def __call__(self, exit_index: int, logits: Logits, history: Floats) -> tuple[Floats, Floats]:
        features, new = see(logits, history)
        return self.of_features(exit_index, features), new

    def of_features(self, exit_index: int, features: NDArray[np.floating[Any]]) -> Floats:
        """Return the scores [rows] of one exit from its features [rows, FEATURES]."""
        with np.errstate(invalid="ignore"):
            helps = _linear(self.gain[exit_index], features)
            score = -helps if self.loss is None else _probability(_linear(self.loss[exit_index], features))
            if self.loss is not None:
                score -= _probability(helps)
        score[~np.isfinite(score)] = -np.inf
        return score

    def of_all_features(self, features: NDArray[np.floating[Any]]) -> Floats:
        """Return the scores [rows, N] from the features [rows, N, FEATURES] of all exits."""
        return np.stack([self.of_features(i, features[:, i]) for i in range(len(self.gain))], axis=1)


def _linear(weights: Floats, features: NDArray[np.floating[Any]]) -> Floats:
    # A matrix product may sum in another order for another number of rows; so that each row's sum has one order:
    total: Floats = (features * weights[:-1]).sum(axis=1) + weights[-1]
    return total


def _probability(log_odds: Floats) -> Floats:
    # tanh neither over- nor underflows, but near 0 it is too coarse to rank by: exp is not.
    small = np.exp(-np.abs(log_odds))
    probability: Floats = np.where(log_odds < 0, small, 1.0) / (1.0 + small)
    return probability
