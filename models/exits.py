"""Exit decisions: confidence scores of one head's logits, and thresholds from exit shares.

The server imports this module, so it uses numpy, not torch. Exits are columns, exit 1 first. An image leaves at the
first exit whose score reaches that exit's threshold (`score >= threshold`), or else at the last. Scores that also use
earlier exits are in `models.scores`; the curve of all operating points is in `models.frontier`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.shares import Floats

Logits = NDArray[np.floating[Any]]
ROUNDING = 1e-9  # images; rounding error of a share times a count, which would make `floor` lose one


def _check(logits: Logits) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must have the shape [rows, classes] with 2 classes or more, not {logits.shape}")


def _odds(logits: Logits) -> tuple[Floats, Floats, Floats]:
    """Return the logit margin [rows], and the logits relative to the runner-up and their exp [rows, classes].

    At the top class these are -inf and 0. Relative to the runner-up nothing over- or underflows.
    """
    _check(logits)
    # Rows are contiguous in memory, so that the order of summation does not depend on the batch.
    others = np.array(logits, dtype=np.float64, order="C")
    rows = np.arange(len(others))
    top_class = others.argmax(axis=1)
    top = others[rows, top_class]
    others[rows, top_class] = -np.inf
    second = others.max(axis=1)
    others -= second[:, None]
    return top - second, others, np.exp(others)


def _never_unless_finite(scores: Floats, margin: Floats) -> Floats:
    scores[~(np.isfinite(margin) & np.isfinite(scores))] = -np.inf
    return scores


def max_softmax(logits: Logits) -> Floats:
    """Return the log-odds of the largest softmax output [rows]: top logit minus logsumexp of the others.

    It orders images as the maximum softmax output does, the score of MSDNet (ICLR 2018) and BoostNet (AAAI 2023), but
    does not saturate: in float32 many easy images have a maximum of exactly 1.0, and ties break exit quotas.
    """
    with np.errstate(all="ignore"):
        margin, _, weights = _odds(logits)
        return _never_unless_finite(margin - np.log(weights.sum(axis=1)), margin)


def logit_margin(logits: Logits) -> Floats:
    """Return the top logit minus the runner-up [rows]."""
    _check(logits)
    leading = np.partition(logits, -2, axis=1)[:, -2:].astype(np.float64)
    if np.isfinite(leading).all():  # the server calls this after every batch: the rest would double its time
        return leading[:, 1] - leading[:, 0]
    with np.errstate(invalid="ignore"):
        margin = leading[:, 1] - leading[:, 0]
        return _never_unless_finite(margin, margin)


def probability_margin(logits: Logits) -> Floats:
    """Return the largest softmax output minus the second, minus 1 [rows], as floats are finer near 0 than near 1."""
    return read_softmax(logits)[2]


def entropy(logits: Logits) -> Floats:
    """Return minus the entropy of the softmax in nats [rows], the score of BranchyNet (ICPR 2016)."""
    with np.errstate(all="ignore"):
        margin, others, weights = _odds(logits)
        runner_up = np.exp(-margin)
        rest = runner_up * weights.sum(axis=1)
        # Classes without weight contribute nothing, but 0 x -inf would be NaN.
        surprise = np.multiply(weights, others - margin[:, None], out=np.zeros_like(weights), where=weights > 0)
        return _never_unless_finite(runner_up * surprise.sum(axis=1) / (1.0 + rest) - np.log1p(rest), margin)


SCORES: dict[str, Callable[[Logits], Floats]] = {
    "max_softmax": max_softmax,
    "logit_margin": logit_margin,
    "probability_margin": probability_margin,
    "entropy": entropy,
}
"""Scores of one head's logits, by name: [rows, classes] to float64 [rows]; higher is more confident, -inf if the logits
are not finite.

A row's score depends only on that row, bit for bit, whatever its batch. `models.scores` has those that also use earlier
exits.
"""


def read_softmax(logits: Logits) -> tuple[NDArray[np.intp], Floats, Floats]:
    """Return the top class, `confidence` and `probability_margin`, [rows] each, from one softmax.

    The server needs all three after every batch; computing them separately takes twice as long.
    """
    _check(logits)
    rows = np.arange(len(logits))
    leading = logits.argmax(axis=1)
    top = logits[rows, leading]
    finite = np.isfinite(top)
    all_finite = bool(finite.all())
    given = logits
    if not all_finite:
        logits, top = np.where(finite[:, None], logits, 0.0), np.where(finite, top, 0.0)
    weights = np.subtract(logits, top[:, None], dtype=np.float64, order="C")  # see `_odds`
    np.exp(weights, out=weights)
    weights[rows, leading] = 0.0
    rest, second = weights.sum(axis=1), weights.max(axis=1)
    share = 1.0 / (1.0 + rest)
    margin = -(rest + second) * share
    if not all_finite or not second.all():  # or a runner-up whose weight underflowed, like that of -inf
        margin[~(finite & np.isfinite(np.partition(given, -2, axis=1)[:, -2]))] = -np.inf
        share[~finite] = 0.0
    return leading, share, margin


def confidence(logits: Logits) -> Floats:
    """Return the largest softmax output [rows], in (0, 1], to show to users; 0 if the logits are not finite."""
    top = logits.max(axis=1, keepdims=True)
    finite = np.isfinite(top)
    if not finite.all():
        logits, top = np.where(finite, logits, 0.0), np.where(finite, top, 0.0)
    weights = np.subtract(logits, top, dtype=np.float64, order="C")  # see `_odds`
    largest: Floats = finite[:, 0] / np.exp(weights, out=weights).sum(axis=1)
    return largest


class Calibrator:
    """Computes threshold vectors from held-out scores [M, N], which it sorts once.

    Raises:
        ValueError: the scores are empty, not two-dimensional, or hold NaN.
    """

    def __init__(self, scores: NDArray[Any]) -> None:
        self.scores = np.asarray(scores, dtype=np.float64)
        if self.scores.ndim != 2 or 0 in self.scores.shape or np.isnan(self.scores).any():
            raise ValueError(f"scores must have the shape [images, exits] and no NaN; these have {self.scores.shape}")
        self.n_images, self.n_exits = self.scores.shape
        self._order = np.argsort(-self.scores, axis=0, kind="stable").T.copy()  # [N, M], most confident image first

    def thresholds(self, shares: Sequence[float] | Floats) -> Floats:
        """Return thresholds [N] at which the held-out images leave in the given shares [N]; the last is -inf.

        The calibration of MSDNet (ICLR 2018): exit by exit, the most confident remaining images leave until the quota
        is filled. Quotas are cumulative, `floor(M (q_1 + ... + q_n))` images by exit n, so no rounding remainder piles
        up at the last exit. Without ties they are met exactly. Images tied at a threshold all leave, because serving
        compares with `>=`, and the later exits take fewer: ties only save compute. A threshold is halfway between the
        last image to leave and the best to stay, so that rounding flips neither. It is +inf if no image is to leave,
        and -inf if all remaining ones are.

        Raises:
            ValueError: the shares are not N numbers in [0, 1] that sum to 1.
        """
        quotas = np.asarray(shares, dtype=np.float64)
        if quotas.shape != (self.n_exits,) or not (quotas >= 0).all() or not abs(quotas.sum() - 1) < 1e-6:
            raise ValueError(f"shares must be {self.n_exits} numbers in [0, 1] that sum to 1, not {quotas.tolist()}")
        gone_by = np.floor(self.n_images * np.cumsum(quotas) + ROUNDING)
        thresholds = np.full(self.n_exits, -np.inf)
        here = np.ones(self.n_images, dtype=bool)
        n_gone = 0
        for exit_index in range(self.n_exits - 1):
            n_leaving = int(gone_by[exit_index]) - n_gone
            if max(n_gone, int(gone_by[exit_index])) >= self.n_images:
                break  # all remaining images leave here: the threshold stays -inf
            if n_leaving <= 0:  # by the shares, or because ties have filled later quotas
                thresholds[exit_index] = np.inf
                continue
            order = self._order[exit_index]
            in_order = self.scores[order[here[order]], exit_index]
            thresholds[exit_index] = _between(in_order[n_leaving - 1], in_order[n_leaving:])
            here &= self.scores[:, exit_index] < thresholds[exit_index]
            n_gone = self.n_images - int(here.sum())
        return thresholds


def _between(last_to_leave: float, staying: Floats) -> float:
    """Return a threshold that `last_to_leave` reaches and, except for ties, none of `staying` (best first)."""
    best_to_stay = staying[np.searchsorted(-staying, -last_to_leave, side="right") :][:1]
    if best_to_stay.size == 0 or not np.isfinite([last_to_leave, best_to_stay[0]]).all():
        return float(last_to_leave)
    middle = 0.5 * float(last_to_leave) + 0.5 * float(best_to_stay[0])
    return middle if middle > best_to_stay[0] else float(last_to_leave)  # no float lies between adjacent ones


def take_exits(scores: NDArray[Any], thresholds: Sequence[float] | Floats) -> NDArray[np.intp]:
    """Return the exit [M], counted from 0, at which each image of scores [M, N] leaves under thresholds [N]."""
    leaves = np.asarray(scores, dtype=np.float64) >= np.asarray(thresholds, dtype=np.float64)
    leaves[:, -1] = True
    return np.asarray(leaves.argmax(axis=1), dtype=np.intp)


def left_by(scores: NDArray[Any], thresholds: Floats) -> NDArray[np.intp]:
    """Return by how many of P threshold vectors each image has left by exit n: [M, N], non-decreasing along N up to P.

    Thresholds [P, N] must not decrease along P. Then the vectors by which an image leaves at exit n are a range of
    indices, from its count at exit n - 1 to that at n, and one pass over the images covers all P. Scores [M, N] must
    not contain NaN.
    """
    counts = np.stack(
        [np.searchsorted(column, values, side="right") for column, values in zip(thresholds.T, scores.T, strict=True)],
        axis=1,
    )
    counts[:, -1] = len(thresholds)
    left: NDArray[np.intp] = np.maximum.accumulate(counts, axis=1)
    return left


@dataclass(frozen=True, slots=True)
class Outcome:
    """The measured results of one threshold vector on a set of images."""

    mean_cost: float  # in the unit of the given costs
    accuracy: float  # share of images answered right, 0 to 1
    shares: tuple[float, ...]  # of the images, by exit


def outcome(
    scores: NDArray[Any],
    correct: NDArray[np.bool_],
    costs_cumulative: Sequence[float],
    thresholds: Sequence[float] | Floats,
) -> Outcome:
    """Measure thresholds [N] on images with scores [M, N]; `correct` [M, N]: whether each exit answers correctly."""
    exits = take_exits(scores, thresholds)
    counts = np.bincount(exits, minlength=len(costs_cumulative))
    n_right = int(np.asarray(correct)[np.arange(len(exits)), exits].sum())
    mean_cost = math.fsum(count * cost for count, cost in zip(counts.tolist(), costs_cumulative, strict=True))
    return Outcome(mean_cost / len(exits), n_right / len(exits), tuple((counts / len(exits)).tolist()))


def outcomes(
    scores: NDArray[Any], correct: NDArray[np.bool_], costs_cumulative: Sequence[float], thresholds: Floats
) -> list[Outcome]:
    """Return `outcome` for each of P threshold vectors [P, N] that do not decrease along P, in one pass."""
    n_images, n_points = len(scores), len(thresholds)
    left = left_by(scores, thresholds)
    before = np.concatenate([np.zeros((n_images, 1), dtype=np.intp), left[:, :-1]], axis=1)
    leaving, right = [], np.zeros(n_points)
    for start, end, answers in zip(before.T, left.T, np.asarray(correct).T, strict=True):
        leaving.append(_covered(start, end, n_points))
        right += _covered(start[answers], end[answers], n_points)
    found = []
    for counts, n_right in zip(np.stack(leaving, axis=1).tolist(), right.tolist(), strict=True):
        mean_cost = math.fsum(count * cost for count, cost in zip(counts, costs_cumulative, strict=True)) / n_images
        found.append(Outcome(mean_cost, n_right / n_images, tuple(count / n_images for count in counts)))
    return found


def _covered(start: NDArray[np.intp], end: NDArray[np.intp], n_points: int) -> Floats:
    """Return how many of the ranges [start, end) cover each of n points [n_points]."""
    opened, closed = (np.bincount(ends, minlength=n_points + 1)[:n_points] for ends in (start, end))
    return np.cumsum(opened - closed).astype(np.float64)
