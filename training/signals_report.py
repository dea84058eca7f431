"""Results of signals as a table on the terminal and as CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from training.policies import in_points
from training.signals import Judged


def write_signals(results: Sequence[Judged], path: Path) -> None:
    """Write a row per signal; leads are in points of top-1."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        kinds = ("heldout_lead_over_paper", "heldout_lead_over_margin", "test_lead_over_margin")
        rows.writerow(["signal", "fitted_on", *(f"{kind}{end}" for kind in kinds for end in ("", "_error"))])
        for result in results:
            numbers = (*result.over_paper, *result.over_margin, *_estimate(result))
            rows.writerow([result.signal.name, result.signal.fitted_on, *(f"{100 * x:.3f}" for x in numbers)])


def print_signals(results: Sequence[Judged], console: Console) -> None:
    headings = "signal", "fitted on", "held out, over the paper's policy", "over logit margin, ratio", "test, same"
    title = "Signals with ratio thresholds: points of top-1, mean over budgets"
    table = Table(*headings, title=title, title_justify="left")
    for result in results:
        leads = (result.over_paper, result.over_margin, _estimate(result))
        cells = (in_points(*lead) for lead in leads)
        table.add_row(result.signal.name.replace("_", " "), result.signal.fitted_on, *cells)
    console.print(table)


def _estimate(result: Judged) -> tuple[float, float]:
    return result.test_over_margin.mean, result.test_over_margin.error
