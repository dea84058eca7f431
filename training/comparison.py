"""Exit policies on test images at equal measured cost, with paired bootstrap intervals.

Every policy has its thresholds from held-out images; what it costs and gets right is measured on test images. Between
its operating points a policy's accuracy is interpolated over its measured cost, and past its dearest one it stays: a
budget is a ceiling. The same resamples of the images are drawn for all policies, so that differences are paired, and
a resample changes what a policy costs as well as what it gets right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from models.exits import left_by
from training.policies import PAPER, Policy

Curve = NDArray[np.float64]
N_COSTS = 20
N_RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Difference:
    """How much more accurate one policy is than another, as shares; over resamples of the test images."""

    mean: float
    error: float  # standard error
    low: float  # 95 % interval
    high: float

    @classmethod
    def of(cls, measured: float, resampled: Curve) -> "Difference":
        low, high = np.percentile(resampled, INTERVAL).tolist()
        return cls(measured, float(resampled.std(ddof=1)), low, high)


@dataclass(frozen=True)
class Compared:
    """One policy at every cost compared at, and on average over them."""

    policy: Policy
    accuracy: tuple[float, ...]
    error: tuple[float, ...]  # standard error of the accuracy
    lead: tuple[Difference, ...]  # over the paper's policy
    mean_lead: Difference


@dataclass(frozen=True)
class Comparison:
    costs_mflops: tuple[float, ...]  # measured, executed
    policies: tuple[Compared, ...]

    def of(self, policy: Policy) -> Compared:
        return next(compared for compared in self.policies if compared.policy == policy)


@dataclass(frozen=True)
class Behaviour:
    """What a policy does with each of M test images at each of B operating points, in order of cost."""

    policy: Policy
    costs: NDArray[np.float32]  # [M, B], millions of multiply-adds
    right: NDArray[np.float32]  # [M, B], 0 or 1


def behaviour(
    policy: Policy,
    scores: NDArray[Any],
    correct: NDArray[np.bool_],
    costs: Sequence[float],
    thresholds: NDArray[np.float64],
) -> Behaviour:
    """Let images with scores [M, N] leave under each of B threshold vectors [B, N], none falling along B."""
    left = left_by(scores, thresholds)
    exits = (left[:, None, :] <= np.arange(len(thresholds))[:, None]).sum(axis=2)
    right = np.take_along_axis(correct, exits, axis=1).astype(np.float32)
    return Behaviour(policy, np.asarray(costs, dtype=np.float32)[exits], right)


def compare(behaviours: Sequence[Behaviour], costs: Sequence[float], seed: int = 0) -> Comparison:
    """Compare policies, the paper's among them, at `N_COSTS` costs evenly spaced up to that of the last exit."""
    grid = np.linspace(costs[0], costs[-1], N_COSTS + 1)[1:]
    n_images = len(behaviours[0].costs)
    weights = resamples(n_images, seed)
    progress = tqdm(behaviours, desc="bootstrap", unit="policy", disable=None)
    drawn = {b.policy: _at_costs(b, weights, grid) for b in progress}  # [1 + resamples, N_COSTS]
    compared = []
    for policy, accuracy in drawn.items():
        leads = accuracy - drawn[PAPER]
        lead = tuple(Difference.of(float(leads[0, i]), leads[1:, i]) for i in range(N_COSTS))
        mean_lead = Difference.of(float(leads[0].mean()), leads[1:].mean(axis=1))
        errors = tuple(accuracy[1:].std(axis=0, ddof=1).tolist())
        compared.append(Compared(policy, tuple(accuracy[0].tolist()), errors, lead, mean_lead))
    return Comparison(tuple(grid.tolist()), tuple(compared))


def resamples(n_images: int, seed: int) -> NDArray[np.float32]:
    """Return how often each of M images is drawn, as shares [1 + N_RESAMPLES, M]; the first row is the images as is."""
    generator = np.random.default_rng(seed)
    weights = np.empty((1 + N_RESAMPLES, n_images), dtype=np.float32)
    weights[0] = 1.0
    for row in weights[1:]:
        row[:] = np.bincount(generator.integers(0, n_images, n_images), minlength=n_images)
    return weights


def _at_costs(done: Behaviour, weights: NDArray[np.float32], grid: Curve) -> Curve:
    """Accuracy [resamples, costs] of one policy, interpolated over what it cost in each resample."""
    n_images, n_points = done.costs.shape
    sums = (weights @ np.concatenate([done.costs, done.right], axis=1)).astype(np.float64) / n_images
    spent, accuracy = sums[:, :n_points], sums[:, n_points:]
    return np.stack([np.interp(grid, x, y) for x, y in zip(spent, accuracy, strict=True)])
