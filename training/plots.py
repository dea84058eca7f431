"""Plots of a run, as PNG: training, accuracy per exit, and the budget curve beside published ones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from models.frontier import FAMILIES
from training.calibration import CalibrationRecord
from training.checkpoint import RunFolder
from training.evaluation import Evaluation
from training.figures import figure_axes
from training.policies import PAPER, name_of
from training.published import CIFAR100_ANYTIME, CIFAR100_BUDGETED, PublishedCurve


def plot_run(folder: RunFolder, evaluation: Evaluation, record: CalibrationRecord) -> list[str]:
    """Draw every plot of a run into its folder and return their names."""
    description = folder.read_description()
    network = description["recipe"]["network"]
    title = " ".join(filter(None, (network["architecture"], network["arguments"].get("config"))))
    title += f" on {record.data_name}, {epochs_of(description, record.epochs)} epochs"
    is_cifar100 = record.data_name == "cifar100"
    plots: dict[Path, Callable[[Path], None]] = {
        folder.path / "anytime.png": lambda path: plot_anytime(path, title, evaluation, is_cifar100),
        folder.path / "budgeted.png": lambda path: plot_budgeted(path, title, evaluation, is_cifar100),
        folder.frontier_plot: lambda path: plot_frontier(path, title, evaluation),
        folder.path / "policies.png": lambda path: plot_policies(path, title, evaluation),
    }
    if log := folder.read_log():
        plots[folder.path / "training.png"] = lambda path: plot_training(path, title, log)
    for path, draw in plots.items():
        draw(path)
    return [path.name for path in plots]


def plot_training(path: Path, title: str, log: Sequence[dict[str, Any]]) -> None:
    """Plot loss and held-out accuracy of every exit by epoch."""
    epochs = [record["epoch"] for record in log]
    with figure_axes(path, title, n_columns=2) as (losses, accuracies):
        for i in range(len(log[0]["losses"])):
            color = mpl.colormaps["viridis"](i / len(log[0]["losses"]))
            losses.plot(epochs, [record["losses"][i] for record in log], color=color, label=f"exit {i + 1}")
            percent = [100 * record["held_out_accuracy"][i] for record in log]
            accuracies.plot(epochs, percent, color=color, label=f"exit {i + 1}")
        losses.set(xlabel="epoch", ylabel="training loss (cross-entropy, with augmentation)")
        accuracies.set(xlabel="epoch", ylabel="top-1 on held-out images, %")
        accuracies.legend()


def epochs_of(description: dict[str, Any], epochs: float) -> str:
    """A run's epochs for titles, after those of the runs that its initial weights come from: "40 + 12"."""
    parts = [epochs]
    while (description := description.get("before") or {}).get("epochs"):
        parts.insert(0, description["epochs"])
    return " + ".join(f"{part:.4g}" for part in parts)


def plot_anytime(path: Path, title: str, evaluation: Evaluation, is_cifar100: bool) -> None:
    """Plot test accuracy of every exit over its cost (published convention), beside published networks."""
    with figure_axes(path, title) as (axes,):
        _draw_published(axes, CIFAR100_ANYTIME if is_cifar100 else ())
        costs = [result.published_mflops for result in evaluation.exits]
        axes.plot(costs, [100 * r.test_accuracy for r in evaluation.exits], "o-", color="C0", label="this network")
        axes.set(xlabel="million multiply-adds (published convention)", ylabel="top-1 on test images, %")
        axes.legend(loc="lower right")


def plot_budgeted(path: Path, title: str, evaluation: Evaluation, is_cifar100: bool) -> None:
    """Plot test accuracy over the mean cost of test images (published convention), beside published curves."""
    with figure_axes(path, title) as (axes,):
        _draw_published(axes, CIFAR100_BUDGETED if is_cifar100 else ())
        for i, policy in enumerate(dict.fromkeys((evaluation.policy, PAPER))):
            points = evaluation.result(policy).points
            axes.plot(
                [point.test_published_mflops for point in points],
                [100 * point.test_accuracy for point in points],
                color=f"C{i}",
                linewidth=2 if policy == evaluation.policy else 1,
                label=f"this network, {name_of(policy)}" + " (chosen)" * (policy == evaluation.policy),
            )
        axes.plot(
            [result.published_mflops for result in evaluation.exits],
            [100 * result.test_accuracy for result in evaluation.exits],
            "o",
            color="0.3",
            markersize=4,
            label="this network, every image at one exit",
        )
        axes.set(xlabel="mean million multiply-adds (published convention)", ylabel="top-1 on test images, %")
        axes.legend(loc="lower right")


def plot_frontier(path: Path, title: str, evaluation: Evaluation) -> None:
    """Plot what a budget buys: test accuracy over executed cost, with the bounds of `training.bounds`."""
    with figure_axes(path, title) as (axes,):
        _draw_bounds(axes, evaluation)
        points = evaluation.chosen.points
        axes.plot(
            [point.test_executed_mflops for point in points],
            [100 * point.test_accuracy for point in points],
            color="C0",
            linewidth=2,
            label=f"each image leaves when sure ({name_of(evaluation.policy)})",
        )
        axes.plot(
            [result.executed_mflops for result in evaluation.exits],
            [100 * result.test_accuracy for result in evaluation.exits],
            "o-",
            color="C1",
            markersize=4,
            linewidth=1,
            label="every image at one exit",
        )
        axes.set(xlabel="mean million multiply-adds an image (executed)", ylabel="top-1 on test images, %")
        axes.legend(loc="lower right")


def plot_policies(path: Path, title: str, evaluation: Evaluation) -> None:
    """Plot every policy's test accuracy at equal measured cost, and its lead over the paper's (with an interval)."""
    costs = evaluation.comparison.costs_mflops
    scores = list(dict.fromkeys(compared.policy.score for compared in evaluation.comparison.policies))
    lines = dict(zip(FAMILIES, ("-", "--", ":"), strict=True))
    with figure_axes(path, title, n_columns=2, width=7.4) as (accuracies, leads):
        _draw_bounds(accuracies, evaluation)
        for compared in evaluation.comparison.policies:
            policy, is_chosen = compared.policy, compared.policy == evaluation.policy
            look: dict[str, Any] = {
                "color": f"C{scores.index(policy.score)}",
                "linestyle": lines[policy.family],
                "linewidth": 2.2 if is_chosen else 0.9,
                "zorder": 3 if is_chosen else 2,
            }
            label = name_of(policy) + " (chosen)" * is_chosen if is_chosen or policy.family == "geometric" else None
            accuracies.plot(costs, [100 * accuracy for accuracy in compared.accuracy], **look)
            leads.plot(costs, [100 * lead.mean for lead in compared.lead], label=label, **look)
            if is_chosen:
                low, high = ([100 * getattr(lead, end) for lead in compared.lead] for end in ("low", "high"))
                leads.fill_between(costs, low, high, color=look["color"], alpha=0.15, linewidth=0, label="its 95 %")
        lowest = min(100 * accuracy for compared in evaluation.comparison.policies for accuracy in compared.accuracy)
        accuracies.set(xlabel="mean million multiply-adds an image (executed)", ylabel="top-1 on test images, %")
        accuracies.set_ylim(bottom=lowest - 2)
        accuracies.legend(loc="lower right")
        leads.set(xlabel="mean million multiply-adds an image (executed)", ylabel=f"points over {name_of(PAPER)}")
        for family, line in list(lines.items())[1:]:
            leads.plot([], [], color="0.4", linestyle=line, linewidth=0.9, label=f"... with {family} thresholds")
        leads.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the plot, where it hides no curve


def _draw_bounds(axes: Axes, evaluation: Evaluation) -> None:
    for points, line, label in (
        (evaluation.oracle, "--", "oracle: leaves at the first exit that is right (upper bound)"),
        (evaluation.steady_oracle, "-.", "oracle that counts only answers that stay"),
        (evaluation.random, ":", "random: as many leave at each exit, but any"),
    ):
        costs, percent = [p.executed_mflops for p in points], [100 * p.accuracy for p in points]
        axes.plot(costs, percent, line, color="0.6", label=label)


def _draw_published(axes: Axes, curves: Sequence[PublishedCurve]) -> None:
    for curve, line in zip(curves, ("--", "-.", ":"), strict=False):
        percent = [100 * accuracy for accuracy in curve.accuracy]
        axes.plot(curve.mflops, percent, line, color="0.45", linewidth=1.2, label=curve.label)
