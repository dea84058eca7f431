"""Compares a gated run with the run it was made from: at the published decision, and over all budgets."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from models.exits import take_exits
from models.frontier import build_frontier
from training.calibration import CalibrationRecord, ExitOutputs
from training.checkpoint import RunFolder
from training.comparison import Behaviour, Estimate, behaviour, lead_at, mean_leads
from training.evaluation import N_BUDGETS, Evaluation, cost_of
from training.figures import figure_axes
from training.jei.gates import Shown
from training.jei.record import SCORE, GateRecord, published_decision, published_thresholds
from training.policies import (
    PAPER,
    Policy,
    choose_family,
    crossfit_rightness,
    fit_scores,
    in_points,
    name_of,
    source_of,
)
from training.predicting import RIDGE, fit_exits, mends
from training.reliability import expected_calibration_error
from training.signals import apply, crossfit_columns
from training.tables import write_csv


@dataclass(frozen=True)
class Beside:
    """One exit policy of the gated run, and its lead over two policies on the source run; accuracies are shares."""

    name: str
    heldout_mflops: float | None  # executed; None: the mean over budgets is compared
    heldout_accuracy: float | None
    test_mflops: float | None
    test_accuracy: float | None
    over_chosen: Estimate  # lead over the policy that the source run's evaluation chose
    over_paper: Estimate


@dataclass(frozen=True)
class Report:
    chosen: Policy  # of the source run
    rows: tuple[Beside, ...]
    curves: dict[str, NDArray[np.float64]]  # by name: mean cost and accuracy on test images [2, points]
    published: tuple[float, float]  # mean cost and accuracy of the published decision
    shares: tuple[float, ...]  # of the test images that leave at each exit, by the published decision
    calibration_error: float  # of the confidence at the exit taken by that decision, over all test images


def report_of(source: RunFolder, target: RunFolder, gates: GateRecord, shown: tuple[Shown, Shown]) -> Report:
    """Compare a gated run with the run it was made from, on the same test images.

    Args:
        shown: its heads' outputs for held-out and for test images.

    Raises:
        RunError: the source run is not evaluated.
    """
    record = CalibrationRecord.load(source)
    chosen = Evaluation.load(source, record).policy
    costs = tuple(cost / 1e6 for cost in cost_of(source, record).executed)
    before, after = ((ExitOutputs.load(f.heldout), ExitOutputs.load(f.test)) for f in (source, target))
    budgets = np.linspace(costs[0], costs[-1], N_BUDGETS).tolist()
    rightness = crossfit_rightness(source_of(SCORE, after[0]), after[0].correct, costs, budgets)
    by_gates = choose_family({Policy(SCORE, family): right for family, right in rightness.items()}, SCORE)
    old, paper = (_behaviour(policy, *before, costs, budgets) for policy in (chosen, PAPER))
    new = {
        f"gates, {by_gates.family}": _behaviour(by_gates, *after, costs, budgets),
        f"{name_of(chosen)}, on the new heads": _behaviour(chosen, *after, costs, budgets),
    }
    reasons = {
        f"{name}, {by_gates.family}": _led(*scores, by_gates.family, *after, costs, budgets)
        for name, scores in _why(gates, shown, after[0].correct).items()
    }
    thresholds = published_thresholds(len(costs))
    decided = [published_decision(part.scores[SCORE], part.correct, costs) for part in after]
    exits = take_exits(after[1].scores[SCORE], thresholds)
    point = Behaviour.of_exits(exits[:, None], after[1].correct, costs)
    published = Beside(
        "gates as published: leave where pi >= 1/2",
        decided[0].mean_cost,
        decided[0].accuracy,
        decided[1].mean_cost,
        decided[1].accuracy,
        lead_at(point, old),
        lead_at(point, paper),
    )
    rows = [published]
    for name, done in {**new, **reasons}.items():
        rows.append(Beside(name, None, None, None, None, *(_mean_lead(done, over, costs) for over in (old, paper))))
    drawn = {**new, f"{name_of(chosen)}, before": old, f"{name_of(PAPER)}, before": paper}
    curves = {name: np.stack([done.costs.mean(axis=0), done.right.mean(axis=0)]) for name, done in drawn.items()}
    taken = np.arange(len(exits)), exits
    error = expected_calibration_error(after[1].confidence[taken], after[1].correct[taken])
    return Report(chosen, tuple(rows), curves, (decided[1].mean_cost, decided[1].accuracy), decided[1].shares, error)


def _mean_lead(done: Behaviour, over: Behaviour, costs: tuple[float, ...]) -> Estimate:
    this, that = Policy("this", ""), Policy("that", "")  # the two networks' policies may have the same name
    return mean_leads({this: done, that: over}, that, costs)[this]


def _behaviour(
    policy: Policy, heldout: ExitOutputs, test: ExitOutputs, costs: tuple[float, ...], budgets: list[float]
) -> Behaviour:
    fitted = fit_scores(heldout)[policy.score]
    scores = fitted.heldout, fitted.of(policy.score, test)
    return _led(*scores, policy.family, heldout, test, costs, budgets)


def _led(
    of_heldout: NDArray[np.floating[Any]],
    of_test: NDArray[np.floating[Any]],
    family: str,
    heldout: ExitOutputs,
    test: ExitOutputs,
    costs: tuple[float, ...],
    budgets: list[float],
) -> Behaviour:
    """Behaviour of test images with scores [M, N], under thresholds fitted to the held-out images' scores."""
    frontier = build_frontier(of_heldout, heldout.correct, costs, family)
    thresholds = np.array([frontier.at_cost(budget).thresholds for budget in budgets])
    return behaviour(of_test, test.correct, costs, thresholds)


def _why(
    gates: GateRecord, shown: tuple[Shown, Shown], correct: NDArray[np.bool_]
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Ablations of the gates' score, for held-out and test images: each gate without those before it, and the gates'
    features fitted to another target."""
    heldout, test = (part.features for part in shown)
    alone = np.empty(heldout.shape[:2])
    for k, weights in enumerate(gates.gates_by_fold):
        rows = np.array(gates.fold) == k
        alone[rows] = apply(np.array(weights), heldout[rows])
    happens = mends(correct)
    return {
        "each gate by itself": (alone, apply(np.array(gates.gates), test)),
        "its inputs, fitted to whether going on mends": (
            crossfit_columns(heldout, happens, RIDGE),
            -apply(fit_exits(heldout, happens), test),
        ),
    }


def print_report(report: Report, gates: GateRecord, console: Console) -> None:
    s, turns = gates.settings, len(gates.turns)
    title = f"JEI-DNN gates, trade-off {s.trade_off:g}, heads {s.heads}, gates fitted on {s.gates_on} images"
    kept = ""
    if s.heads != "kept":
        kept = f"\nturn {gates.kept + 1} of {turns} was kept" + (", with the initial heads" * (gates.kept == 0))
    table = Table(
        title=f"{title}: points of top-1 over the source run",
        title_justify="left",
        caption="at equal measured cost, on test images ('any': the mean over 20 costs). With the published decision,\n"
        f"{' '.join(f'{100 * share:.1f}' for share in report.shares)} % leave at exit 1, 2, ..., "
        f"and the calibration error is {100 * report.calibration_error:.1f} points{kept}",
        caption_justify="left",
    )
    over = [f"over {name_of(policy)}" for policy in (report.chosen, PAPER)]
    for heading in ("policy", "held out, M", "top-1", "test, M", "top-1", *over):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for row in report.rows:
        table.add_row(
            row.name,
            *(_number(row.heldout_mflops), _number(row.heldout_accuracy, 100)),
            *(_number(row.test_mflops), _number(row.test_accuracy, 100)),
            *(in_points(lead.mean, lead.error) for lead in (row.over_chosen, row.over_paper)),
        )
    console.print(table)


def _number(value: float | None, scale: float = 1.0) -> str:
    return "any" if value is None else f"{scale * value:.2f}"


def write_report(report: Report, path: Path) -> None:
    """Write gates.csv, a row per policy; leads are shares, with their standard error and 95 % interval."""
    rows = []
    for row in report.rows:
        plain = {name: value for name, value in asdict(row).items() if not isinstance(value, dict)}
        leads = {"over_chosen": row.over_chosen, "over_paper": row.over_paper}
        plain |= {f"{over}_{key}": x for over, lead in leads.items() for key, x in asdict(lead).items()}
        rows.append(plain)
    write_csv(path, rows)


def plot_report(report: Report, gates: GateRecord, path: Path) -> None:
    """Plot the course of the turns, and accuracy over cost beside the source run."""
    s, title = gates.settings, f"JEI-DNN gates, trade-off {gates.settings.trade_off:g}, heads {gates.settings.heads}"
    has_turns = s.heads != "kept"
    with figure_axes(path, title, n_columns=2 if has_turns else 1) as axes:
        _draw_curves(axes[-1], report)
        if has_turns:
            _draw_turns(axes[0], gates)


def _draw_turns(axes: mpl.axes.Axes, gates: GateRecord) -> None:
    steps = [turn.step for turn in gates.turns]
    axes.plot(steps, [100 * turn.accuracy for turn in gates.turns], "o-", markersize=3, label="top-1, %")
    axes.plot(steps, [100 * turn.cost_share for turn in gates.turns], "s-", markersize=3, label="cost, % of full")
    kept = gates.turns[gates.kept]
    axes.plot([kept.step], [100 * kept.accuracy], "k*", markersize=12, label="kept")
    axes.set(xlabel="steps of the heads", ylabel="held-out images, leaving as published")
    axes.legend()


def _draw_curves(axes: mpl.axes.Axes, report: Report) -> None:
    lines: Sequence[str] = ("-", "--", "-", ":")
    for (name, (costs, accuracy)), line in zip(report.curves.items(), lines, strict=False):
        axes.plot(costs, 100 * accuracy, line, linewidth=1.4, label=name)
    axes.plot([report.published[0]], [100 * report.published[1]], "k*", markersize=10, label=report.rows[0].name)
    axes.set(xlabel="mean million multiply-adds an image (executed)", ylabel="top-1 on test images, %")
    axes.legend(loc="lower right")
