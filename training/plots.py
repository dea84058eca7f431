"""Plots of a run, as PNG: learning, accuracy per exit, and the budget curve beside what is published."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from training.calibration import CalibrationRecord
from training.checkpoint import RunFolder
from training.evaluation import Evaluation
from training.figures import figure_axes
from training.published import CIFAR100_ANYTIME, CIFAR100_BUDGETED, PublishedCurve

SCORE_LABELS = {"max_softmax": "max softmax", "logit_margin": "logit margin"}


def plot_run(folder: RunFolder, evaluation: Evaluation, record: CalibrationRecord) -> list[str]:
    """Draw every plot of a run into its folder and return their names."""
    network = folder.read_description()["recipe"]["network"]
    title = " ".join(filter(None, (network["architecture"], network["arguments"].get("config"))))
    title += f" on {record.data_name}, {record.epochs:.4g} epochs"
    is_cifar100 = record.data_name == "cifar100"
    plots: dict[Path, Callable[[Path], None]] = {
        folder.path / "anytime.png": lambda path: plot_anytime(path, title, evaluation, is_cifar100),
        folder.path / "budgeted.png": lambda path: plot_budgeted(path, title, evaluation, is_cifar100),
        folder.frontier_plot: lambda path: plot_frontier(path, title, evaluation),
    }
    if log := folder.read_log():
        plots[folder.path / "training.png"] = lambda path: plot_training(path, title, log)
    for path, draw in plots.items():
        draw(path)
    return [path.name for path in plots]


def plot_training(path: Path, title: str, log: Sequence[dict[str, Any]]) -> None:
    """Loss and held-out accuracy of every exit by epoch."""
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


def plot_anytime(path: Path, title: str, evaluation: Evaluation, is_cifar100: bool) -> None:
    """Test accuracy of every exit over its cost, published convention, beside published networks."""
    with figure_axes(path, title) as (axes,):
        _draw_published(axes, CIFAR100_ANYTIME if is_cifar100 else ())
        costs = [result.published_mflops for result in evaluation.exits]
        axes.plot(costs, [100 * r.test_accuracy for r in evaluation.exits], "o-", color="C0", label="this network")
        axes.set(xlabel="million multiply-adds (published convention)", ylabel="top-1 on test images, %")
        axes.legend(loc="lower right")


def plot_budgeted(path: Path, title: str, evaluation: Evaluation, is_cifar100: bool) -> None:
    """Test accuracy over the mean cost that test images had, published convention, beside published curves."""
    with figure_axes(path, title) as (axes,):
        _draw_published(axes, CIFAR100_BUDGETED if is_cifar100 else ())
        for i, result in enumerate(evaluation.scores):
            is_chosen = result.score == evaluation.score
            axes.plot(
                [point.test_published_mflops for point in result.points],
                [100 * point.test_accuracy for point in result.points],
                color=f"C{i}",
                linewidth=2 if is_chosen else 1,
                label=f"this network, {SCORE_LABELS.get(result.score, result.score)}" + " (chosen)" * is_chosen,
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
    """What a server gets for a budget: test accuracy over executed cost, with the oracle above it."""
    with figure_axes(path, title) as (axes,):
        axes.plot(
            [point.executed_mflops for point in evaluation.oracle],
            [100 * point.accuracy for point in evaluation.oracle],
            "--",
            color="0.6",
            label="oracle: leaves at the first exit that is right (upper bound)",
        )
        points = evaluation.chosen.points
        axes.plot(
            [point.test_executed_mflops for point in points],
            [100 * point.test_accuracy for point in points],
            color="C0",
            linewidth=2,
            label=f"each image leaves when sure ({SCORE_LABELS.get(evaluation.score, evaluation.score)})",
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


def _draw_published(axes: Axes, curves: Sequence[PublishedCurve]) -> None:
    for curve, line in zip(curves, ("--", "-.", ":"), strict=False):
        percent = [100 * accuracy for accuracy in curve.accuracy]
        axes.plot(curve.mflops, percent, line, color="0.45", linewidth=1.2, label=curve.label)
