"""Which exit score, with which family of thresholds: compared and chosen on held-out images alone, by cross-fitting."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.exits import SCORES, left_by, outcomes
from models.frontier import FAMILIES, Frontier, build_frontier
from models.predictor import Predictor
from training.calibration import ExitOutputs
from training.predicting import FITTED, crossfit

Rows = NDArray[np.intp]
N_HALVINGS = 4  # random halvings of the held-out images, each used both ways round
N_CROSSFIT_POINTS = 33


@dataclass(frozen=True, order=True)
class Policy:
    """How images leave: an exit score, and the family of thresholds it is compared with."""

    score: str
    family: str  # a key of `models.frontier.FAMILIES`


PAPER = Policy("max_softmax", "geometric")
"""That of MSDNet and BoostNet: what every other one is measured against."""


def name_of(policy: Policy) -> str:
    """A policy as people read it."""
    return f"{policy.score.replace('_', ' ')}, {policy.family}"


def all_policies(heldout: ExitOutputs) -> list[Policy]:
    return [Policy(score, family) for score in (*heldout.scores, *FITTED) for family in FAMILIES]


@dataclass(frozen=True)
class Fitted:
    """What is kept of the held-out images to serve a score with."""

    heldout: NDArray[np.float32]  # [M, N]: no image scored by what was fitted on it
    predictor: Predictor | None  # fitted on all of them

    def of(self, name: str, outputs: ExitOutputs) -> NDArray[np.floating[Any]]:
        """The scores [M, N] of other images."""
        return outputs.scores[name] if self.predictor is None else self.predictor.of_all_features(outputs.features)


def fit_scores(heldout: ExitOutputs) -> dict[str, Fitted]:
    """Every score by name, those to be fitted fitted on the held-out images. The same images give the same numbers."""
    plain = {name: Fitted(values, None) for name, values in heldout.scores.items()}
    features, correct = heldout.features, heldout.correct
    return plain | {
        name: Fitted(crossfit(name, features, correct).astype(np.float32), fit(features, correct))
        for name, fit in FITTED.items()
    }


Source = Callable[[Rows, Rows], tuple[NDArray[Any], NDArray[Any]]]
"""Scores of the images that set thresholds, and of those judged by them, where the latter had no part in either."""


def source_of(name: str, heldout: ExitOutputs) -> Source:
    """A score as a source; one that is to be fitted is fitted anew on the images that set the thresholds."""
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
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """How often each of M images is answered right over the budgets, with thresholds that other images set.

    The images are halved at random, thresholds from one half judged on the other, both ways round, several times. Every
    halving is the same for every score and family, so that differences are paired.

    Returns:
        by family [M], each 0 to 1: mean over budgets and halvings, corrected for what the image's half spent more or
        less than the budget, along the slope of its curve.
    """
    n_images = len(correct)
    right = {family: np.zeros(n_images) for family in families}
    generator = np.random.default_rng(seed)
    for _ in range(N_HALVINGS):
        order = generator.permutation(n_images)
        halves = order[: n_images // 2], order[n_images // 2 :]
        for judged, fitted in (halves, halves[::-1]):
            fitted_scores, judged_scores = source(fitted, judged)
            for family, sums in right.items():
                frontier = build_frontier(fitted_scores, correct[fitted], costs, family, N_CROSSFIT_POINTS)
                points = [frontier.at(frontier.position_at_cost(budget)) for budget in budgets]
                thresholds = np.array([point.thresholds for point in points])
                left = left_by(judged_scores, thresholds)
                n_budgets = np.diff(left, axis=1, prepend=0)  # at which each image leaves at exit n
                spent = [o.mean_cost for o in outcomes(judged_scores, correct[judged], costs, thresholds)]
                worth = [
                    _accuracy_at(frontier, b) - _accuracy_at(frontier, s) for b, s in zip(budgets, spent, strict=True)
                ]
                sums[judged] += (correct[judged] * n_budgets).sum(axis=1) + sum(worth)
    return {family: sums / (N_HALVINGS * len(budgets)) for family, sums in right.items()}


def _accuracy_at(frontier: Frontier, cost: float) -> float:
    return frontier.at(frontier.position_at_cost(cost)).accuracy


def choose_family(rightness: dict[Policy, NDArray[np.float64]], score: str) -> Policy:
    """Return the policy of this score that is right the most often."""
    return max((policy for policy in rightness if policy.score == score), key=lambda policy: rightness[policy].mean())


def choose(rightness: dict[Policy, NDArray[np.float64]]) -> Policy:
    """Return the policy whose lead over the paper's is the largest that one standard error leaves of it.

    The best mean alone would often be a wide guess. Where no lead is left, it is the paper's own. A score that is
    fitted or remembers earlier exits must also be ahead of the best that needs neither, by one standard error of
    their difference.
    """

    def sure_lead(policy: Policy, over: Policy = PAPER) -> float:
        lead = rightness[policy] - rightness[over]
        return float(lead.mean() - lead.std() / np.sqrt(len(lead)))

    def best(policies: Iterable[Policy]) -> Policy:
        return max(policies, key=lambda policy: (sure_lead(policy), policy == PAPER))

    overall, plain = best(rightness), best(policy for policy in rightness if policy.score in SCORES)
    return overall if sure_lead(overall, plain) > 0 else plain
