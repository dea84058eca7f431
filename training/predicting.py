"""Fits exit scores that predict whether going on is worth it, on held-out images alone.

There is one logistic regression per exit, on the features of `models.predictor`. Thresholds are never fitted to scores
of images that the predictor itself was fitted to: `crossfit` scores every image by a predictor fitted to others.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.predictor import Predictor

Answers = NDArray[np.bool_]
N_FOLDS = 5
RIDGE = 3.0  # on weights of features scaled to a standard deviation of 1; in images
MAX_STEPS = 50


def mends(correct: Answers) -> Answers:
    """Whether going on mends the answer [M, N]: this exit is wrong, and a later one is right."""
    later = np.stack([correct[:, i + 1 :].any(axis=1) for i in range(correct.shape[1])], axis=1)
    mending: Answers = ~correct & later
    return mending


def fit_as_good(features: NDArray[Any], correct: Answers) -> Predictor:
    """Fit the probability that stopping is as good as going on: this exit is right, or no later one is.

    Args:
        features: [M, N, FEATURES].
        correct: [M, N].
    """
    return Predictor(fit_exits(features, mends(correct)))


def fit_expected_gain(features: NDArray[Any], correct: Answers) -> Predictor:
    """Fit the expected gain in accuracy of going on to the last exit: P(it mends the answer) - P(it spoils it)."""
    last = correct[:, -1:]
    return Predictor(fit_exits(features, ~correct & last), fit_exits(features, correct & ~last))


FITTED: dict[str, Callable[[NDArray[Any], Answers], Predictor]] = {
    "as_good": fit_as_good,
    "expected_gain": fit_expected_gain,
}
"""Fitted scores by name."""


def folds_of(n_images: int, seed: int = 0) -> NDArray[np.intp]:
    """Draw the fold of every image for cross-fitting: [M], from 0 to at most `N_FOLDS` - 1."""
    fold: NDArray[np.intp] = np.random.default_rng(seed).permutation(n_images) % min(N_FOLDS, n_images)
    return fold


def crossfit(name: str, features: NDArray[Any], correct: Answers) -> NDArray[np.float64]:
    """Score every image by a predictor that was fitted to the other folds: [M, N]."""
    fold = folds_of(len(features))
    scores = np.empty(correct.shape)
    for k in np.unique(fold):
        others = fold != k if fold.any() else fold == k
        scores[fold == k] = FITTED[name](features[others], correct[others]).of_all_features(features[fold == k])
    return scores


def fit_exits(features: NDArray[Any], happens: Answers, ridge_images: float = RIDGE) -> NDArray[np.float64]:
    """Fit weights and bias [N, F + 1] of the log-odds of `happens` [M, N] on features [M, N, F].

    They are zero at the last exit, where every image stops.
    """
    weights = np.zeros((features.shape[1], features.shape[2] + 1))
    for i in range(features.shape[1] - 1):
        weights[i] = logistic_regression(features[:, i].astype(np.float64), happens[:, i], ridge_images)
    return weights


def logistic_regression(
    features: NDArray[np.float64],
    happens: Answers,
    ridge_images: float = RIDGE,
    counts: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Fit weights and bias [F + 1] of the log-odds of `happens` [M] on features [M, F], by damped Newton steps.

    A ridge penalty keeps the weights finite if features are constant, collinear or separate the images. Rows that are
    not finite are left out.

    Args:
        counts: weight of each image [M]; by default 1.
    """
    usable = np.isfinite(features).all(axis=1)
    x, y = features[usable], happens[usable].astype(np.float64)
    n = np.ones(len(x)) if counts is None else counts[usable]
    if not len(x):
        return np.zeros(features.shape[1] + 1)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-9] = 1.0
    z = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    ridge = np.full(z.shape[1], ridge_images)
    ridge[-1] = 1e-3  # small: the bias needs it only where `happens` is always false or always true

    def loss_of(weights: NDArray[np.float64]) -> float:
        log_odds = z @ weights
        return float(n @ (np.logaddexp(0.0, log_odds) - y * log_odds) + 0.5 * ridge @ weights**2)

    weights = np.zeros(z.shape[1])
    loss = loss_of(weights)
    for _ in range(MAX_STEPS):
        p = 0.5 * (1.0 + np.tanh(0.5 * (z @ weights)))
        gradient = z.T @ (n * (p - y)) + ridge * weights
        curvature = (z * (n * p * (1.0 - p))[:, None]).T @ z + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        damping = 1.0
        while (new := loss_of(weights - damping * step)) > loss and damping > 1e-6:
            damping *= 0.5
        if new > loss:
            break
        converged = loss - new < 1e-9 * (1.0 + abs(loss))
        weights, loss = weights - damping * step, new
        if converged:
            break
    weights[:-1] /= scale
    weights[-1] -= weights[:-1] @ mean
    return weights
