"""How good a trained network is: at every exit (anytime), and on average for a budget (budgeted batch).

Thresholds come from held-out images; accuracy and cost are measured on test images, never targeted. Costs are in
millions of multiply-adds an image, in both conventions of `models.cost`: `executed` is what the stages run and a server
charges, `published` what papers count. Budgets and thresholds are of executed cost.
"""

import csv
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.cost import NetworkCost, measure_cost
from models.exits import outcome, take_exits
from models.frontier import Frontier, build_frontier
from training.calibration import CalibrationRecord, ExitOutputs
from training.checkpoint import RunError, RunFolder
from training.objectives import network_of

N_BUDGETS = 41  # evenly spaced from the cost of exit 1 to that of exit N
N_HALVINGS = 5  # random halvings of the held-out images, each used both ways round
N_CROSSFIT_POINTS = 65


@dataclass(frozen=True)
class ExitResult:
    """One exit, when every image leaves there. Accuracies are shares, 0 to 1."""

    exit: int  # from 1
    published_mflops: float
    executed_mflops: float
    published_macs_m: float
    executed_macs_m: float
    parameters: int  # up to here
    heldout_accuracy: float
    test_accuracy: float
    test_top5_accuracy: float


@dataclass(frozen=True)
class BudgetResult:
    """One operating point: what was asked for, what held-out images promised, what test images did."""

    budget_mflops: float  # executed
    heldout_mflops: float
    heldout_accuracy: float
    test_executed_mflops: float
    test_published_mflops: float
    test_accuracy: float
    test_shares: tuple[float, ...]  # of the images, by exit


@dataclass(frozen=True)
class ScoreResult:
    """One exit score, with thresholds from the held-out images."""

    score: str
    family: str  # of exit shares, see `models.frontier`
    crossfit_accuracy: float  # mean over the budgets, on held-out images that did not set the thresholds
    crossfit_behind: float  # by how much the best score is better, on the same images
    crossfit_behind_error: float  # standard error of that difference
    points: tuple[BudgetResult, ...]

    def shown(self, n_points: int = 9) -> list[BudgetResult]:
        """A few points from the cheapest to the one past which more is not spent, for tables."""
        end = next(i for i, point in enumerate(self.points) if point.heldout_mflops == self.points[-1].heldout_mflops)
        return [self.points[i] for i in sorted({round(end * k / (n_points - 1)) for k in range(n_points)})]


@dataclass(frozen=True)
class OraclePoint:
    executed_mflops: float
    published_mflops: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    score: str  # the one chosen, on held-out images alone
    exits: tuple[ExitResult, ...]
    scores: tuple[ScoreResult, ...]
    oracle: tuple[OraclePoint, ...]  # on test images: who must go how deep is known beforehand

    @property
    def chosen(self) -> ScoreResult:
        return next(result for result in self.scores if result.score == self.score)

    def save(self, folder: RunFolder, record: CalibrationRecord) -> None:
        """Write results.json (all of it), anytime.csv and budgeted.csv into the run's folder."""
        told = {"step": record.step, "epochs": record.epochs, **asdict(self)}
        folder.results.write_text(json.dumps(told, indent=1) + "\n")
        _write_csv(folder, "anytime.csv", [asdict(result) for result in self.exits])
        rows: list[dict[str, Any]] = []
        for result in self.scores:
            for point in result.points:
                row = asdict(point)
                shares = row.pop("test_shares")
                rows.append({"score": result.score, **row, **{f"share_{n}": x for n, x in enumerate(shares, start=1)}})
        _write_csv(folder, "budgeted.csv", rows)

    @classmethod
    def load(cls, folder: RunFolder, record: CalibrationRecord) -> "Evaluation":
        """Read results.json.

        Raises:
            RunError: the run was not evaluated, or not since it was calibrated.
        """
        if not folder.results.is_file():
            raise RunError(f"{folder.path}: not evaluated yet; run `python -m training evaluate` first")
        try:
            told = json.loads(folder.results.read_text())
            step = told["step"]
            evaluation = cls(
                told["score"],
                tuple(ExitResult(**values) for values in told["exits"]),
                tuple(_score_result(values) for values in told["scores"]),
                tuple(OraclePoint(**values) for values in told["oracle"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{folder.results}: damaged or of another version; evaluate again") from error
        if step != record.step:
            raise RunError(f"{folder.path}: evaluated at step {step}, calibrated at {record.step}; evaluate again")
        return evaluation


def cost_of(folder: RunFolder, record: CalibrationRecord) -> NetworkCost:
    """Count what the network of a run costs at each exit; no weights are needed."""
    with torch.device("meta"):
        network = network_of(folder.read_recipe(), len(record.class_names))
    return measure_cost(network, record.image_size_px)


def evaluate(heldout: ExitOutputs, test: ExitOutputs, cost: NetworkCost) -> Evaluation:
    """Measure a network from what its exits said of held-out and test images, and choose its exit score.

    The score is chosen by cross-fitting on the held-out images alone, so that the test images measure it fairly.
    """
    executed, published = (tuple(n / 1e6 for n in counts) for counts in (cost.executed, cost.published))
    budgets = np.linspace(executed[0], executed[-1], N_BUDGETS).tolist()
    exits = tuple(
        ExitResult(
            exit=i + 1,
            published_mflops=published[i],
            executed_mflops=executed[i],
            published_macs_m=cost.published_macs[i] / 1e6,
            executed_macs_m=cost.executed_macs[i] / 1e6,
            parameters=cost.parameters[i],
            heldout_accuracy=float(heldout.correct[:, i].mean()),
            test_accuracy=float(test.correct[:, i].mean()),
            test_top5_accuracy=float(test.correct_top5[:, i].mean()),
        )
        for i in range(len(executed))
    )
    rightness = {
        name: crossfit_rightness(values, heldout.correct, executed, budgets) for name, values in heldout.scores.items()
    }
    chosen = max(rightness, key=lambda name: float(rightness[name].mean()))
    scores = []
    for name, values in heldout.scores.items():
        behind = rightness[chosen] - rightness[name]
        frontier = build_frontier(values, heldout.correct, executed)
        points = tuple(_measured(frontier, budget, test, name, executed, published) for budget in budgets)
        error = float(behind.std() / np.sqrt(len(behind)))
        scores.append(
            ScoreResult(name, frontier.family, float(rightness[name].mean()), float(behind.mean()), error, points)
        )
    return Evaluation(chosen, exits, tuple(scores), oracle_curve(test.correct, executed, published))


def crossfit_rightness(
    scores: NDArray[np.floating[Any]],
    correct: NDArray[np.bool_],
    costs: tuple[float, ...],
    budgets: list[float],
    seed: int = 0,
) -> NDArray[np.float64]:
    """How often each of M images is answered right over the budgets, with thresholds that other images set.

    The images are halved at random, thresholds from one half judged on the other, both ways round, several times. Every
    halving is the same for every score, so that differences are paired.

    Returns:
        [M], each 0 to 1: mean over budgets and halvings, corrected for what the image's half spent more or less than
        the budget, along the slope of its curve.
    """
    n_images = len(scores)
    right = np.zeros(n_images)
    generator = np.random.default_rng(seed)
    for _ in range(N_HALVINGS):
        order = generator.permutation(n_images)
        halves = order[: n_images // 2], order[n_images // 2 :]
        for judged, fitted in (halves, halves[::-1]):
            frontier = build_frontier(scores[fitted], correct[fitted], costs, n_points=N_CROSSFIT_POINTS)
            for budget in budgets:
                point = frontier.at(frontier.position_at_cost(budget))
                left_at = take_exits(scores[judged], point.thresholds)
                spent = float(np.asarray(costs)[left_at].mean())
                worth = _accuracy_at(frontier, budget) - _accuracy_at(frontier, spent)
                right[judged] += correct[judged, left_at] + worth
    return right / (N_HALVINGS * len(budgets))


def _accuracy_at(frontier: Frontier, cost: float) -> float:
    return frontier.at(frontier.position_at_cost(cost)).accuracy


def _measured(
    frontier: Frontier,
    budget: float,
    test: ExitOutputs,
    score: str,
    executed: tuple[float, ...],
    published: tuple[float, ...],
) -> BudgetResult:
    promised = frontier.at(frontier.position_at_cost(budget))
    done = outcome(test.scores[score], test.correct, executed, promised.thresholds)
    return BudgetResult(
        budget_mflops=budget,
        heldout_mflops=promised.cost,
        heldout_accuracy=promised.accuracy,
        test_executed_mflops=done.mean_cost,
        test_published_mflops=float(np.dot(done.shares, published)),
        test_accuracy=done.accuracy,
        test_shares=done.shares,
    )


def oracle_curve(
    correct: NDArray[np.bool_], executed: tuple[float, ...], published: tuple[float, ...]
) -> tuple[OraclePoint, ...]:
    """The best that any rule for leaving could do with these heads: an upper bound, known only with the labels.

    Each image is worth going on with only to the first exit that is right. Ordered by what that costs, point n sends
    every image that is right by exit n to its first right exit and lets the rest leave at exit 1; between points the
    bound is a straight line, and no rule beats it.
    """
    n_exits = correct.shape[1]
    first_right = np.where(correct.any(axis=1), correct.argmax(axis=1), 0)
    points = []
    for deepest in range(n_exits):
        left_at = np.where(first_right <= deepest, first_right, 0)
        shares = np.bincount(left_at, minlength=n_exits) / len(correct)
        accuracy = float(correct[np.arange(len(correct)), left_at].mean())
        points.append(OraclePoint(float(shares @ executed), float(shares @ published), accuracy))
    return tuple(points)


def _score_result(values: dict[str, Any]) -> ScoreResult:
    points = tuple(BudgetResult(**{**p, "test_shares": tuple(p["test_shares"])}) for p in values["points"])
    return ScoreResult(**{**values, "points": points})


def _write_csv(folder: RunFolder, name: str, rows: list[dict[str, Any]]) -> None:
    with (folder.path / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)
