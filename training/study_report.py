"""A study's results as tables on the terminal and as figures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from training.figures import figure_axes
from training.policies import in_points
from training.study import VariantResult


def print_study(results: Sequence[VariantResult], console: Console) -> None:
    """Print every variant's accuracy, gain over the baseline with one standard error, and share of valid samples."""
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
    baseline = next(result.label for result in results if result.is_baseline)
    table = Table(title=f"Gain on test images over {baseline}, points (± one standard error over images)")
    for heading in ("variant", "seed", *(str(n + 1) for n in range(n_exits)), "mean"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for result in (result for result in results if not result.is_baseline):
        gains = [in_points(*pair) for pair in zip(result.gain.mean(0), result.gain_error, strict=True)]
        table.add_row(result.label, "all", *gains, f"{100 * result.gain.mean():+.2f}")
        for seed, gain in zip(result.seeds, 100 * result.gain, strict=True):
            table.add_row("", str(seed), *(f"{g:+.2f}" for g in gain), f"{gain.mean():+.2f}")
    console.print(table)
    table = Table(title="Valid samples in the last epoch, % of those trained on (mean over seeds)")
    for heading in ("variant", *(str(n + 1) for n in range(n_exits))):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for result in results:
        table.add_row(result.label, *(f"{100 * share:.1f}" for share in result.valid_shares[:, -1].mean(0)))
    console.print(table)


def plot_study(path: Path, title: str, results: Sequence[VariantResult]) -> None:
    """Plot test accuracy and gain over the baseline, by exit: means over seeds, and every seed as a faint line."""
    with figure_axes(path, title, n_columns=2) as (accuracies, gains):
        for i, result in enumerate(results):
            exits = np.arange(1, result.gain.shape[1] + 1)
            accuracies.plot(exits, 100 * result.test_accuracy.mean(0), "o-", color=f"C{i}", markersize=3)
            gains.errorbar(
                exits, 100 * result.gain.mean(0), 100 * result.gain_error, color=f"C{i}", capsize=2, label=result.label
            )
            if len(result.seeds) > 1:
                accuracies.plot(exits, 100 * result.test_accuracy.T, color=f"C{i}", alpha=0.3, linewidth=0.8)
                gains.plot(exits, 100 * result.gain.T, color=f"C{i}", alpha=0.3, linewidth=0.8)
        accuracies.set(xlabel="exit", ylabel="top-1 on test images, %", xticks=exits)
        gains.set(xlabel="exit", ylabel="gain over the baseline, points", xticks=exits)
        _legend_below(gains)


def plot_valid_shares(path: Path, title: str, results: Sequence[VariantResult]) -> None:
    """Plot the share of valid samples by epoch (BoostNet, Fig. 3), a panel per exit from the second on.

    Exit 1 has 90 % by definition, and is drawn only if it is the only one.
    """
    n_exits = results[0].gain.shape[1]
    first = min(1, n_exits - 1)
    with figure_axes(path, title, n_columns=n_exits - first, width=3.0) as panels:
        for i, result in enumerate(results):
            epochs = np.arange(1, result.valid_shares.shape[1] + 1)
            for exit_index, axes in enumerate(panels, start=first):
                shares = 100 * result.valid_shares[:, :, exit_index]
                axes.plot(epochs, shares.mean(0), "o-", color=f"C{i}", markersize=3, label=result.label)
                if len(result.seeds) > 1:
                    axes.plot(epochs, shares.T, color=f"C{i}", alpha=0.3, linewidth=0.8)
                axes.set_title(f"exit {exit_index + 1}", fontsize=9)
                axes.set(xlabel="epoch", xticks=epochs if len(epochs) < 10 else epochs[::10])
        lowest = min(axes.get_ylim()[0] for axes in panels)
        for axes in panels:
            axes.set_ylim(lowest, 92)
        panels[0].set(ylabel="valid samples, % of those trained on")
        _legend_below(panels[0])


def _legend_below(axes: Axes) -> None:
    """Put the legend below the figure: inside, it would hide the lines of many variants."""
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
