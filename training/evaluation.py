"""Evaluates a trained network: at every exit (anytime), and on average over images at a budget (budgeted batch).

Thresholds come from held-out images; accuracy and cost are measured on test images, never targeted. Costs are in
millions of multiply-adds per image, in both conventions of `models.cost`: `executed` is what the stages run and a
server charges, `published` what papers count. Budgets and thresholds refer to the executed cost.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from models.calibration import Calibration
from models.cost import NetworkCost, measure_cost
from models.exits import outcomes
from models.frontier import Frontier, build_frontier
from models.predictor import FEATURES, Predictor
from training.bounds import BoundPoint, bound_curve, oracle_exits, random_curve, steady_exits
from training.calibration import CalibrationRecord, ExitOutputs
from training.checkpoint import RunError, RunFolder
from training.comparison import Behaviour, Comparison, behaviour, compare
from training.jei.record import SCORE, GateRecord
from training.objectives import network_of
from training.policies import (
    PAPER,
    Policy,
    all_policies,
    choose,
    choose_family,
    crossfit_rightness,
    fit_scores,
    source_of,
)
from training.reliability import expected_calibration_error

N_BUDGETS = 41  # evenly spaced from the cost of exit 1 to that of exit N


@dataclass(frozen=True)
class ExitResult:
    """Results of one exit if every image leaves there. Accuracies are shares, 0 to 1."""

    exit: int  # from 1
    published_mflops: float
    executed_mflops: float
    published_macs_m: float
    executed_macs_m: float
    parameters: int  # up to this exit
    heldout_accuracy: float
    test_accuracy: float
    test_top5_accuracy: float
    test_calibration_error: float  # expected distance of confidence from accuracy, see `training.reliability`


@dataclass(frozen=True)
class BudgetResult:
    """One operating point: the budget, the result expected from held-out images, and that of test images."""

    budget_mflops: float  # executed
    heldout_mflops: float
    heldout_accuracy: float
    test_executed_mflops: float
    test_published_mflops: float
    test_accuracy: float
    test_shares: tuple[float, ...]  # of the images, by exit


@dataclass(frozen=True)
class PolicyResult:
    """Results of one policy. Its thresholds, and its score if that is fitted, come from the held-out images."""

    policy: Policy
    crossfit_accuracy: float  # mean over the budgets, on held-out images that did not set the thresholds
    crossfit_lead: float  # over the paper's policy, on the same images
    crossfit_lead_error: float  # standard error of that difference
    points: tuple[BudgetResult, ...]

    def shown(self, n_points: int = 9) -> list[BudgetResult]:
        """For tables, a few points from the cheapest to the first at which the policy spends the most it ever does."""
        end = next(i for i, point in enumerate(self.points) if point.heldout_mflops == self.points[-1].heldout_mflops)
        return [self.points[i] for i in sorted({round(end * k / (n_points - 1)) for k in range(n_points)})]


@dataclass(frozen=True)
class Evaluation:
    policy: Policy  # chosen on held-out images alone
    predictor: dict[str, Any] | None  # the weights of its score if that is fitted, in the form of the manifest
    exits: tuple[ExitResult, ...]
    policies: tuple[PolicyResult, ...]
    comparison: Comparison  # on test images, at equal measured cost
    # On test images, see `training.bounds`.
    oracle: tuple[BoundPoint, ...]  # the best exit of every image is known beforehand
    steady_oracle: tuple[BoundPoint, ...]  # the same, counting only answers that stay right at all later exits
    random: tuple[BoundPoint, ...]  # as many images leave at each exit as with the chosen policy, but at random

    @property
    def chosen(self) -> PolicyResult:
        return self.result(self.policy)

    def result(self, policy: Policy) -> PolicyResult:
        return next(result for result in self.policies if result.policy == policy)

    def manifest_fields(self) -> dict[str, Any]:
        """The fields of a bundle's manifest about the exits and the exit policy."""
        exits = [
            {
                "published_mflops": result.published_mflops,
                "executed_mflops": result.executed_mflops,
                "macs_m": result.published_macs_m,
                "executed_macs_m": result.executed_macs_m,
                "test_accuracy": result.test_accuracy,
                "heldout_accuracy": result.heldout_accuracy,
            }
            for result in self.exits
        ]
        policy = {"score": self.policy.score, "family": self.policy.family, "predictor": self.predictor}
        return {"exits": exits, **policy}

    def save(self, folder: RunFolder, record: CalibrationRecord) -> None:
        """Write results.json into the run's folder; see `training.tables` for the .csv files."""
        values = {"step": record.step, "epochs": record.epochs, **asdict(self)}
        folder.results.write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, folder: RunFolder, record: CalibrationRecord) -> "Evaluation":
        """Read results.json.

        Raises:
            RunError: the run was not evaluated, or not since it was calibrated.
        """
        if not folder.results.is_file():
            raise RunError(f"{folder.path}: not evaluated yet; run `python -m training evaluate` first")
        try:
            values = json.loads(folder.results.read_text())
            step = values.pop("step")
            values.pop("epochs")
            evaluation = TypeAdapter(cls).validate_python(values)
        except (ValueError, KeyError, AttributeError, ValidationError) as error:
            raise RunError(f"{folder.results}: damaged, or from another version; evaluate again") from error
        if step != record.step:
            raise RunError(f"{folder.path}: evaluated at step {step}, but calibrated at {record.step}; evaluate again")
        return evaluation


def calibration_of(heldout: ExitOutputs) -> Calibration:
    """A bundle's calibration, from the held-out images: every score, fitted ones by cross-fitting."""
    return Calibration({name: fitted.heldout for name, fitted in fit_scores(heldout).items()}, heldout.correct)


def cost_of(folder: RunFolder, record: CalibrationRecord) -> NetworkCost:
    """Count the cost of a run's network at each exit, without loading its weights."""
    with torch.device("meta"):
        network = network_of(folder.read_recipe(), len(record.class_names))
    return measure_cost(network, record.image_size_px)


def evaluate(heldout: ExitOutputs, test: ExitOutputs, cost: NetworkCost, gates: GateRecord | None = None) -> Evaluation:
    """Evaluate a network from its exits' outputs for held-out and test images, and choose its exit policy.

    Score and family are chosen by cross-fitting on the held-out images alone, so that the test images measure the
    chosen policy fairly.

    Args:
        gates: of a gated run: its score is always that of the gates, even if another is better.
    """
    costs = _Costs(tuple(n / 1e6 for n in cost.executed), tuple(n / 1e6 for n in cost.published))
    budgets = np.linspace(costs.executed[0], costs.executed[-1], N_BUDGETS).tolist()
    rightness: dict[Policy, NDArray[np.float64]] = {}
    policies = all_policies(heldout)
    for score in tqdm(dict.fromkeys(policy.score for policy in policies), desc="cross-fitting", disable=None):
        source = source_of(score, heldout)
        by_family = crossfit_rightness(source, heldout.correct, costs.executed, budgets)
        rightness |= {Policy(score, family): right for family, right in by_family.items()}
    chosen = choose(rightness) if gates is None else choose_family(rightness, SCORE)
    paper = rightness[PAPER]
    fitted = fit_scores(heldout)
    results, behaviours = [], {}
    for policy in tqdm(policies, desc="thresholds", unit="policy", disable=None):
        score = fitted[policy.score]
        frontier = build_frontier(score.heldout, heldout.correct, costs.executed, policy.family)
        points, behaviours[policy] = _measure(frontier, budgets, score.of(policy.score, test), test.correct, costs)
        lead = rightness[policy] - paper
        error = float(lead.std() / np.sqrt(len(lead)))
        results.append(PolicyResult(policy, float(rightness[policy].mean()), float(lead.mean()), error, points))
    predictor = plain_predictor(fitted[chosen.score].predictor) if gates is None else gates.manifest_fields()
    shares = np.array([p.test_shares for result in results if result.policy == chosen for p in result.points])
    return Evaluation(
        policy=chosen,
        predictor=predictor,
        exits=_exits(heldout, test, cost),
        policies=tuple(results),
        comparison=compare(behaviours, chosen, shares, test.correct, costs.executed),
        oracle=bound_curve(oracle_exits(test.correct), test.correct, *costs),
        steady_oracle=bound_curve(steady_exits(test.correct), test.correct, *costs),
        random=random_curve(shares, test.correct, *costs),
    )


class _Costs(NamedTuple):
    """Cumulative costs [N] in millions of multiply-adds."""

    executed: tuple[float, ...]
    published: tuple[float, ...]


def _exits(heldout: ExitOutputs, test: ExitOutputs, cost: NetworkCost) -> tuple[ExitResult, ...]:
    return tuple(
        ExitResult(
            exit=i + 1,
            published_mflops=cost.published[i] / 1e6,
            executed_mflops=cost.executed[i] / 1e6,
            published_macs_m=cost.published_macs[i] / 1e6,
            executed_macs_m=cost.executed_macs[i] / 1e6,
            parameters=cost.parameters[i],
            heldout_accuracy=float(heldout.correct[:, i].mean()),
            test_accuracy=float(test.correct[:, i].mean()),
            test_top5_accuracy=float(test.correct_top5[:, i].mean()),
            test_calibration_error=expected_calibration_error(test.confidence[:, i], test.correct[:, i]),
        )
        for i in range(len(cost.executed))
    )


def plain_predictor(predictor: Predictor | None) -> dict[str, Any] | None:
    """The weights of a fitted score in the form of the manifest."""
    if predictor is None:
        return None
    loss = None if predictor.loss is None else predictor.loss.tolist()
    return {"features": list(FEATURES), "gain": predictor.gain.tolist(), "loss": loss}


def _measure(
    frontier: Frontier,
    budgets: list[float],
    scores: NDArray[Any],
    correct: NDArray[np.bool_],
    costs: _Costs,
) -> tuple[tuple[BudgetResult, ...], Behaviour]:
    """Results of test images with scores [M, N] at every budget: in total, and image by image."""
    promised = [frontier.at_cost(budget) for budget in budgets]
    thresholds = np.array([point.thresholds for point in promised])
    measured = outcomes(scores, correct, costs.executed, thresholds)
    points = []
    for budget, point, done in zip(budgets, promised, measured, strict=True):
        points.append(
            BudgetResult(
                budget_mflops=budget,
                heldout_mflops=point.cost,
                heldout_accuracy=point.accuracy,
                test_executed_mflops=done.mean_cost,
                test_published_mflops=float(np.dot(done.shares, costs.published)),
                test_accuracy=done.accuracy,
                test_shares=done.shares,
            )
        )
    return tuple(points), behaviour(scores, correct, costs.executed, thresholds)
