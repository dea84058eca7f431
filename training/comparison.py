"""Compares exit policies on test images at equal measured cost, with paired bootstrap intervals.

A policy's thresholds come from held-out images; its cost and accuracy are measured on test images. Between its
operating points, accuracy is interpolated over measured cost; beyond the most expensive one it stays constant, as a
budget is a ceiling. All policies are measured on the same resamples of the images, so that differences are paired; a
resample changes a policy's cost as well as its accuracy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from models.exits import left_by
from training.bounds import oracle_exits, steady_exits
from training.policies import PAPER, Policy

Curve = NDArray[np.float64]
N_COSTS = 20
N_RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Estimate:
    """A number measured on the test images, and its spread over resamples of them. Accuracies are shares."""

    mean: float  # on the images themselves
    error: float  # standard error
    low: float  # 95 % interval
    high: float

    @classmethod
    def of(cls, measured: float, resampled: Curve) -> "Estimate":
        low, high = np.percentile(resampled, INTERVAL).tolist()
        return cls(measured, float(resampled.std(ddof=1)), low, high)


@dataclass(frozen=True)
class Compared:
    """One policy at every cost of the comparison, and on average over them."""

    policy: Policy
    accuracy: tuple[float, ...]
    error: tuple[float, ...]  # standard error of the accuracy
    lead: tuple[Estimate, ...]  # over the paper's policy
    mean_lead: Estimate


@dataclass(frozen=True)
class Comparison:
    costs_mflops: tuple[float, ...]  # measured, executed
    policies: tuple[Compared, ...]
    # How far the chosen policy gets from random exits (in the same shares) to either oracle, 0 to 1: the mean over the
    # costs. See `training.bounds`.
    headroom: Estimate
    steady_headroom: Estimate

    def of(self, policy: Policy) -> Compared:
        return next(compared for compared in self.policies if compared.policy == policy)


@dataclass(frozen=True)
class Behaviour:
    """Cost and correctness of each of M test images at each of B operating points, in order of cost."""

    costs: NDArray[np.float32]  # [M, B], millions of multiply-adds
    right: NDArray[np.float32]  # [M, B], 0 or 1, or a probability

    @classmethod
    def of_exits(cls, exits: NDArray[np.intp], correct: NDArray[np.bool_], costs: Sequence[float]) -> "Behaviour":
        """Images leave at `exits` [M, B], counted from 0."""
        right = np.take_along_axis(correct, exits, axis=1).astype(np.float32)
        return cls(np.asarray(costs, dtype=np.float32)[exits], right)

    @classmethod
    def at_random(cls, shares: NDArray[np.float64], correct: NDArray[np.bool_], costs: Sequence[float]) -> "Behaviour":
        """Every image leaves at exit n with the probability `shares` [B, N]."""
        spent = np.broadcast_to(shares @ np.asarray(costs), (len(correct), len(shares)))
        return cls(spent.astype(np.float32), (correct @ shares.T).astype(np.float32))


def behaviour(
    scores: NDArray[Any],
    correct: NDArray[np.bool_],
    costs: Sequence[float],
    thresholds: NDArray[np.float64],
) -> Behaviour:
    """Behaviour of images with scores [M, N] under B threshold vectors [B, N], which must not decrease along B."""
    left = left_by(scores, thresholds)
    exits = (left[:, None, :] <= np.arange(len(thresholds))[:, None]).sum(axis=2)
    return Behaviour.of_exits(exits, correct, costs)


def compare(
    behaviours: Mapping[Policy, Behaviour],
    chosen: Policy,
    shares: NDArray[np.float64],
    correct: NDArray[np.bool_],
    costs: Sequence[float],
) -> Comparison:
    """Compare policies, the paper's among them, at `N_COSTS` costs evenly spaced up to that of the last exit.

    Args:
        behaviours: of every policy on the same M images.
        chosen: the policy whose headroom is measured.
        shares: of the images that leave at each exit with it [B, N].
        correct: [M, N].
        costs: cumulative [N].
    """
    grid = np.linspace(costs[0], costs[-1], N_COSTS + 1)[1:]
    weights = resamples(len(correct))
    progress = tqdm(behaviours.items(), desc="bootstrap", unit="policy", disable=None)
    drawn = {policy: _at_costs(done, weights, grid) for policy, done in progress}  # [1 + resamples, N_COSTS]
    by_chance = _at_costs(Behaviour.at_random(shares, correct, costs), weights, grid)
    headroom = []
    for bound in (oracle_exits, steady_exits):
        best = _at_costs(Behaviour.of_exits(bound(correct), correct, costs), weights, grid)
        reached = ((drawn[chosen] - by_chance) / np.maximum(best - by_chance, 1e-9)).mean(axis=1)
        headroom.append(Estimate.of(float(reached[0]), reached[1:]))
    compared = []
    for policy, accuracy in drawn.items():
        leads = accuracy - drawn[PAPER]
        lead = tuple(Estimate.of(float(leads[0, i]), leads[1:, i]) for i in range(N_COSTS))
        mean_lead = Estimate.of(float(leads[0].mean()), leads[1:].mean(axis=1))
        errors = tuple(accuracy[1:].std(axis=0, ddof=1).tolist())
        compared.append(Compared(policy, tuple(accuracy[0].tolist()), errors, lead, mean_lead))
    return Comparison(tuple(grid.tolist()), tuple(compared), *headroom)


def mean_leads(behaviours: Mapping[Policy, Behaviour], over: Policy, costs: Sequence[float]) -> dict[Policy, Estimate]:
    """The lead of every policy over one of them, on average over the costs of `compare`."""
    grid = np.linspace(costs[0], costs[-1], N_COSTS + 1)[1:]
    weights = resamples(len(behaviours[over].costs))
    reference = _at_costs(behaviours[over], weights, grid)
    leads = {policy: (_at_costs(done, weights, grid) - reference).mean(axis=1) for policy, done in behaviours.items()}
    return {policy: Estimate.of(float(lead[0]), lead[1:]) for policy, lead in leads.items()}


def lead_at(point: Behaviour, over: Behaviour) -> Estimate:
    """The lead of one operating point [M, 1] over a policy at the same measured cost."""
    weights = resamples(len(point.costs))
    spent, right = ((weights @ of).astype(np.float64)[:, 0] / len(of) for of in (point.costs, point.right))
    leads = right - np.array([_at_costs(over, w[None], c[None])[0, 0] for w, c in zip(weights, spent, strict=True)])
    return Estimate.of(float(leads[0]), leads[1:])


def resamples(n_images: int) -> NDArray[np.float32]:
    """Return how often each of M images is drawn, [1 + N_RESAMPLES, M]; the first row is 1 for every image."""
    generator = np.random.default_rng(0)
    weights = np.empty((1 + N_RESAMPLES, n_images), dtype=np.float32)
    weights[0] = 1.0
    for row in weights[1:]:
        row[:] = np.bincount(generator.integers(0, n_images, n_images), minlength=n_images)
    return weights


def _at_costs(done: Behaviour, weights: NDArray[np.float32], grid: Curve) -> Curve:
    """Accuracy [resamples, costs] of one policy, interpolated over its cost in each resample."""
    n_images, n_points = done.costs.shape
    sums = (weights @ np.concatenate([done.costs, done.right], axis=1)).astype(np.float64) / n_images
    spent, accuracy = sums[:, :n_points], sums[:, n_points:]
    return np.stack([np.interp(grid, x, y) for x, y in zip(spent, accuracy, strict=True)])
