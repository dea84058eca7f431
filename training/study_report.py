"""A study as people read it: a table on the terminal and a figure."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from training.figures import figure_axes
from training.study import VariantResult


def print_study(results: Sequence[VariantResult], console: Console) -> None:
    """Held-out and test accuracy of every variant, and its gain over the baseline with one standard error."""
    n_exits = results[0].gain.shape[1]
    for title, part in (("held-out images", "held_out_accuracy"), ("test images", "test_accuracy")):
        table = Table(title=f"Top-1 on {title}, %, by exit (mean over seeds)")
        for heading in ("variant", "seeds", "minutes", *(str(n + 1) for n in range(n_exits)), "mean"):
            table.add_column(heading, justify="left" if heading == "variant" else "right")
        for result in results:
            accuracy = 100 * getattr(result, part).mean(0)
            cells = [f"{x:.2f}" for x in (*accuracy, accuracy.mean())]
            table.add_row(result.label, str(len(result.seeds)), f"{result.minutes:.1f}", *cells)
        console.print(table)
    table = Table(title="Gain on test images over the baseline, points (± one standard error over images)")
    for heading in ("variant", *(str(n + 1) for n in range(n_exits)), "mean"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for result in results[1:]:
        gains = [f"{100 * g:+.2f} ± {100 * e:.2f}" for g, e in zip(result.gain.mean(0), result.gain_error, strict=True)]
        table.add_row(result.label, *gains, f"{100 * result.gain.mean():+.2f}")
    console.print(table)


def plot_study(path: Path, title: str, results: Sequence[VariantResult]) -> None:
    """Gain over the baseline and share of valid samples, by exit, every seed a faint line of its own."""
    with figure_axes(path, title, n_columns=2) as (gains, shares):
        for i, result in enumerate(results):
            exits = np.arange(1, result.gain.shape[1] + 1)
            gains.errorbar(
                exits, 100 * result.gain.mean(0), 100 * result.gain_error, color=f"C{i}", capsize=2, label=result.label
            )
            if len(result.seeds) > 1:
                gains.plot(exits, 100 * result.gain.T, color=f"C{i}", alpha=0.3, linewidth=0.8)
            shares.plot(exits, 100 * result.valid_shares.mean(0), "o-", color=f"C{i}", markersize=3)
        gains.set(xlabel="exit", ylabel="top-1 on test images less the baseline's, points")
        gains.legend()
        shares.set(xlabel="exit", ylabel="valid samples in the last epoch, % of those trained on")
