"""Exit policies: compares scores and threshold families on held-out images alone, by cross-fitting, and chooses one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.exits import SCORES, left_by, outcomes
from models.frontier import FAMILIES, build_frontier
from models.predictor import Predictor
from training.calibration import ExitOutputs
from training.predicting import FITTED, crossfit

Rows = NDArray[np.intp]
N_HALVINGS = 4  # random halvings of the held-out images; in each, either half sets thresholds for the other
N_CROSSFIT_POINTS = 33


@dataclass(frozen=True, order=True)
class Policy:
    """An exit policy: a score, and the family of the thresholds that it is compared with."""

    score: str
    family: str  # a key of `models.frontier.FAMILIES`


PAPER = Policy("max_softmax", "geometric")
"""The policy of the MSDNet and BoostNet papers: all others are compared with it."""


def name_of(policy: Policy) -> str:
    """A policy's name for tables and plots."""
    return f"{policy.score.replace('_', ' ')}, {policy.family}"


def in_points(mean: float, error: float) -> str:
    """A lead and its standard error, both shares, in points of top-1."""
    return f"{100 * mean:+.2f} ± {100 * error:.2f}"


def all_policies(heldout: ExitOutputs) -> list[Policy]:
    return [Policy(score, family) for score in (*heldout.scores, *FITTED) for family in FAMILIES]


@dataclass(frozen=True)
class Fitted:
    """A score as it is served: its values on held-out images and, if it is fitted, its predictor."""

    heldout: NDArray[np.float32]  # [M, N]; of a fitted score, by cross-fitting
    predictor: Predictor | None  # fitted to all held-out images

    def of(self, name: str, outputs: ExitOutputs) -> NDArray[np.floating[Any]]:
        """The scores [M, N] of other images; `name` is this score's."""
        return outputs.scores[name] if self.predictor is None else self.predictor.of_all_features(outputs.features)


def fit_scores(heldout: ExitOutputs) -> dict[str, Fitted]:
    """Every score by name; those that need fitting are fitted to the held-out images, deterministically."""
    plain = {name: Fitted(values, None) for name, values in heldout.scores.items()}
    features, correct = heldout.features, heldout.correct
    return plain | {
        name: Fitted(crossfit(name, features, correct).astype(np.float32), fit(features, correct))
        for name, fit in FITTED.items()
    }


Source = Callable[[Rows, Rows], tuple[NDArray[Any], NDArray[Any]]]
"""Maps (rows that set thresholds, rows to be judged) to the scores of both; nothing is fitted to the judged rows."""


def source_of(name: str, heldout: ExitOutputs) -> Source:
    """A score as a `Source`. One that needs fitting is fitted anew to the images that set the thresholds."""
    if name not in FITTED:
        values = heldout.scores[name]
        return lambda fitted, judged: (values[fitted], values[judged])
    features, correct = heldout.features, heldout.correct

    def fit_and_score(fitted: Rows, judged: Rows) -> tuple[NDArray[Any], NDArray[Any]]:
        predictor = FITTED[name](features[fitted], correct[fitted])
        return crossfit(name, features[fitted], correct[fitted]), predictor.of_all_features(features[judged])

    return fit_and_score


def crossfit_rightness(
    source: Source,
    correct: NDArray[np.bool_],
    costs: tuple[float, ...],
    budgets: list[float],
    families: Iterable[str] = tuple(FAMILIES),
) -> dict[str, NDArray[np.float64]]:
    """How often each of M images is answered right, over all budgets, with thresholds fitted to other images.

    The images are split in half at random, several times; each half is judged by thresholds from the other. The
    halvings are the same for every score and family, so that differences are paired.

    Returns:
        by family [M]: mean over budgets and halvings of whether the image is right, 0 or 1. Where a half spends more
        or less than the budget, this is corrected along the frontier's curve of accuracy over cost.
    """
    n_images = len(correct)
    right = {family: np.zeros(n_images) for family in families}
    generator = np.random.default_rng(0)
    for _ in range(N_HALVINGS):
        order = generator.permutation(n_images)
        halves = order[: n_images // 2], order[n_images // 2 :]
        for judged, fitted in (halves, halves[::-1]):
            fitted_scores, judged_scores = source(fitted, judged)
            for family, sums in right.items():
                frontier = build_frontier(fitted_scores, correct[fitted], costs, family, N_CROSSFIT_POINTS)
                points = [frontier.at_cost(budget) for budget in budgets]
                thresholds = np.array([point.thresholds for point in points])
                left = left_by(judged_scores, thresholds)
                n_budgets = np.diff(left, axis=1, prepend=0)  # at which each image leaves at exit n
                spent = [o.mean_cost for o in outcomes(judged_scores, correct[judged], costs, thresholds)]
                worth = [p.accuracy - frontier.at_cost(s).accuracy for p, s in zip(points, spent, strict=True)]
                sums[judged] += (correct[judged] * n_budgets).sum(axis=1) + sum(worth)
    return {family: sums / (N_HALVINGS * len(budgets)) for family, sums in right.items()}


def choose_family(rightness: dict[Policy, NDArray[np.float64]], score: str) -> Policy:
    """Return the policy with this score that is right most often."""
    return max((policy for policy in rightness if policy.score == score), key=lambda policy: rightness[policy].mean())


def choose(rightness: dict[Policy, NDArray[np.float64]]) -> Policy:
    """Return the policy with the largest lead over the paper's, less one standard error of that lead.

    The error is subtracted because the best mean alone may be luck. If no lead remains, the paper's policy is chosen. A
    score that is fitted or remembers earlier exits must also be ahead of the best that does neither, by one standard
    error of their difference.
    """

    def sure_lead(policy: Policy, over: Policy = PAPER) -> float:
        lead = rightness[policy] - rightness[over]
        return float(lead.mean() - lead.std() / np.sqrt(len(lead)))

    def best(policies: Iterable[Policy]) -> Policy:
        return max(policies, key=lambda policy: (sure_lead(policy), policy == PAPER))

    overall, plain = best(rightness), best(policy for policy in rightness if policy.score in SCORES)
    return overall if sure_lead(overall, plain) > 0 else plain
