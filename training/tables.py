"""Results as tables on the terminal, and as .csv files in a run's folder."""

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from training.checkpoint import RunFolder
from training.comparison import Estimate
from training.evaluation import Evaluation
from training.policies import PAPER, in_points, name_of
from training.quantising import Quantised


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print accuracy per exit, the comparison of policies, and the budget curve of the chosen one."""
    anytime = Table(title="Every image at one exit (M = million multiply-adds per image)", title_justify="left")
    accuracies = ("held-out top-1", "test top-1", "test top-5", "test ECE")
    for heading in ("exit", "published M", "executed M", *accuracies):
        anytime.add_column(heading, justify="right")
    for result in evaluation.exits:
        anytime.add_row(
            str(result.exit),
            f"{result.published_mflops:.2f}",
            f"{result.executed_mflops:.2f}",
            _percent(result.heldout_accuracy),
            _percent(result.test_accuracy),
            _percent(result.test_top5_accuracy),
            _percent(result.test_calibration_error),
        )
    console.print(anytime)

    console.print(_policies(evaluation))

    budgeted = Table(
        title=f"With early exit ({name_of(evaluation.policy)}), measured on test images",
        title_justify="left",
    )
    for heading in ("budget M", "executed M", "published M", "top-1", "leaving at exit 1, 2, ... %"):
        budgeted.add_column(heading, justify="right")
    for point in evaluation.chosen.shown():
        budgeted.add_row(
            f"{point.budget_mflops:.2f}",
            f"{point.test_executed_mflops:.2f}",
            f"{point.test_published_mflops:.2f}",
            _percent(point.test_accuracy),
            " ".join(f"{100 * share:.0f}" for share in point.test_shares),
        )
    console.print(budgeted)


def print_precisions(made: Quantised, console: Console) -> None:
    """Print the accuracy of float and int8 stages on the test images, per exit and at some budgets."""
    anytime = Table(title="Every image at one exit, test top-1", title_justify="left")
    for heading in ("exit", "fp32", "int8", "points"):
        anytime.add_column(heading, justify="right")
    accuracies = zip(made.fp32.test_accuracy, made.int8.test_accuracy, strict=True)
    for number, (fp32, int8) in enumerate(accuracies, start=1):
        anytime.add_row(str(number), _percent(fp32), _percent(int8), f"{100 * (int8 - fp32):+.2f}")
    console.print(anytime)

    budgeted = Table(title="With early exit, measured on test images", title_justify="left")
    for heading in ("budget", "fp32 executed M", "fp32 top-1", "int8 executed M", "int8 top-1", "points"):
        budgeted.add_column(heading, justify="right")
    for a, b in zip(made.fp32.budgets, made.int8.budgets, strict=True):
        budgeted.add_row(
            f"{a.fraction:.0%}",
            f"{a.executed_mflops:.2f}",
            _percent(a.accuracy),
            f"{b.executed_mflops:.2f}",
            _percent(b.accuracy),
            f"{100 * (b.accuracy - a.accuracy):+.2f}",
        )
    console.print(budgeted)


def _policies(evaluation: Evaluation) -> Table:
    costs = evaluation.comparison.costs_mflops
    table = Table(
        title=f"Points over {name_of(PAPER)}: cross-fitted on held-out images, and on test images\n"
        f"at {len(costs)} equal measured costs up to {costs[-1]:.1f} M: the mean, and the worst of them",
        title_justify="left",
        caption=f"chosen on the held-out images: {name_of(evaluation.policy)}; of the distance from random exits to\n"
        f"the oracle it covers {_percent_of(evaluation.comparison.headroom)}; if only answers that stay right count, "
        f"{_percent_of(evaluation.comparison.steady_headroom)}",
        caption_justify="left",
    )
    for heading in ("score", "thresholds"):
        table.add_column(heading, no_wrap=True)
    for heading in ("held out", "test", "test, worst"):
        table.add_column(heading, justify="right")  # may wrap, but is never cut
    for result in evaluation.policies:
        compared = evaluation.comparison.of(result.policy)
        lead, worst = compared.mean_lead, min(compared.lead, key=lambda difference: difference.mean)
        table.add_row(
            result.policy.score,
            result.policy.family,
            in_points(result.crossfit_lead, result.crossfit_lead_error),
            in_points(lead.mean, lead.error),
            in_points(worst.mean, worst.error),
            style="bold" if result.policy == evaluation.policy else None,
        )
    return table


def write_tables(folder: RunFolder, evaluation: Evaluation) -> list[str]:
    """Write anytime.csv (by exit), budgeted.csv (by policy and budget) and policies.csv (by policy at equal cost).

    Returns:
        the names of the files.
    """
    budgeted: list[dict[str, Any]] = []
    for result in evaluation.policies:
        for point in result.points:
            row = asdict(point)
            shares = row.pop("test_shares")
            shares = {f"share_{n}": share for n, share in enumerate(shares, start=1)}
            budgeted.append({**asdict(result.policy), **row, **shares})
    equal_cost = []
    for compared in evaluation.comparison.policies:
        rows = zip(evaluation.comparison.costs_mflops, compared.accuracy, compared.error, compared.lead, strict=True)
        for cost, accuracy, error, lead in rows:
            row = {"executed_mflops": cost, "test_accuracy": accuracy, "error": error}
            equal_cost.append({**asdict(compared.policy), **row, **{f"lead_{k}": v for k, v in asdict(lead).items()}})
    tables = {
        "anytime.csv": [asdict(result) for result in evaluation.exits],
        "budgeted.csv": budgeted,
        "policies.csv": equal_cost,
    }
    for name, table in tables.items():
        write_csv(folder.path / name, table)
    return list(tables)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys, each a column; floats have six digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()} for row in rows)


def _percent_of(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} ± {100 * estimate.error:.1f} %"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
