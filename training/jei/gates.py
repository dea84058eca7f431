"""What a gate is to say, and the fit that makes it say so."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.gates import GATE_FEATURES
from training.predicting import N_FOLDS, logistic_regression

Floats = NDArray[np.float64]
MOST_WEIGHT = 5.0  # of an image at which a gate is to open, against one at which it is not


@dataclass(frozen=True)
class Shown:
    """What N heads show of M images, for gates to be fitted on."""

    features: Floats  # [M, N, GATE_FEATURES]
    losses: Floats  # [M, N]: cross-entropy in nats

    def of(self, rows: NDArray[Any]) -> "Shown":
        return Shown(self.features[rows], self.losses[rows])


def best_exits(losses: Floats, cost_shares: Sequence[float], trade_off: float) -> NDArray[np.intp]:
    """The exit [M], from 0, at which cross-entropy plus `trade_off` times the cost is least.

    Args:
        losses: [M, N].
        cost_shares: of stopping at each exit, cumulative, of that of the last; [N], the last is 1.
    """
    best: NDArray[np.intp] = (losses + trade_off * np.asarray(cost_shares)).argmin(axis=1)
    return best


def gate_targets(best: NDArray[np.intp], n_exits: int) -> NDArray[np.bool_]:
    """Whether each gate [M, N - 1] is to open: at an image's best exit, and at all after it."""
    targets: NDArray[np.bool_] = np.arange(n_exits - 1) >= best[:, None]
    return targets


def class_weights(best: NDArray[np.intp], n_exits: int) -> Floats:
    """What an image at which a gate is to open counts [N - 1]: as many times as other exits are the best of more
    images than this one, as published; at most `MOST_WEIGHT`.

    An exit that is the best of all has no others to be weighed against, and counts 1: as published it would be 0, so
    that its gate learned nothing, stayed at one half, and let go on whom it is best to keep."""
    n_best = np.bincount(best, minlength=n_exits)[:-1]
    n_others = len(best) - n_best
    return np.where(n_others == 0, 1.0, np.minimum(MOST_WEIGHT, n_others / np.maximum(n_best, 1e-9)))


def fit_gates(
    shown: Shown, cost_shares: Sequence[float], trade_off: float, weights_from: Shown | None = None
) -> Floats:
    """Fit all gates to images: weights [N, 5], the bias last, zeros at the last exit.

    Each is a logistic regression on five numbers, so the published loss (binary cross-entropy, class weights) has one
    minimum, and Newton steps go all the way to it where the published code takes 200 steps of SGD a turn.

    Args:
        weights_from: images that the class weights are counted on; by default the same.
    """
    n_exits = shown.losses.shape[1]
    targets = gate_targets(best_exits(shown.losses, cost_shares, trade_off), n_exits)
    counted = best_exits((weights_from or shown).losses, cost_shares, trade_off)
    weights = np.zeros((n_exits, len(GATE_FEATURES) + 1))
    for i, weight in enumerate(class_weights(counted, n_exits)):
        counts = np.where(targets[:, i], weight, 1.0)
        weights[i] = logistic_regression(shown.features[:, i], targets[:, i], counts=counts)
    return weights


@dataclass(frozen=True)
class FoldedGates:
    """Gates fitted on all held-out images, and on all but each fold of them."""

    weights: Floats  # [N, 5]
    by_fold: Floats  # [folds, N, 5]
    fold: NDArray[np.intp]  # [M]: the fold that an image is in

    def parts(self) -> list[tuple[NDArray[np.bool_], Floats]]:
        """Images [M] and the gates that had no part of them, fold by fold."""
        return [(self.fold == k, weights) for k, weights in enumerate(self.by_fold)]


def fit_on_heldout(heldout: Shown, cost_shares: Sequence[float], trade_off: float, seed: int) -> FoldedGates:
    """Fit gates to the held-out images, so that each of these can be judged by gates that it had no part in."""
    n_folds = min(N_FOLDS, len(heldout.losses))
    fold = np.random.default_rng(seed).permutation(len(heldout.losses)) % n_folds
    by_fold = [fit_gates(heldout.of(fold != k), cost_shares, trade_off) for k in range(n_folds)]
    return FoldedGates(fit_gates(heldout, cost_shares, trade_off), np.stack(by_fold), fold)


def fit_on_training(train: Shown, heldout: Shown, cost_shares: Sequence[float], trade_off: float) -> FoldedGates:
    """Fit gates to the training images, as published: no held-out image has a part in them but for class weights."""
    weights = fit_gates(train, cost_shares, trade_off, heldout)
    return FoldedGates(weights, weights[None], np.zeros(len(heldout.losses), dtype=np.intp))
