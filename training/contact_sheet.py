"""A contact sheet: test images that leave at the first exit, above others that leave late (BoostNet, Fig. 5)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from models.exits import take_exits
from models.frontier import build_frontier
from training.calibration import CalibrationRecord, ExitOutputs
from training.checkpoint import RunError, RunFolder
from training.evaluation import Evaluation
from training.figures import figure_axes
from training.image_set import ImageSet
from training.policies import fit_scores

N_CLASSES, ROWS_EACH = 10, 3


@dataclass(frozen=True)
class Sheet:
    """The test images shown: `easy` ones leave at the first exit, `hard` ones at the last; indices [rows, classes]."""

    classes: list[int]
    easy: NDArray[np.intp]
    hard: NDArray[np.intp]
    last_exit: int  # from 1: the deepest at which enough images leave


def choose_images(
    exits: NDArray[np.intp], correct: NDArray[np.bool_], labels: NDArray[np.int64], n_classes: int, rows_each: int
) -> Sheet:
    """Choose the first images, in the order of the set, of the first classes with enough at both ends: no hand-picking.

    Args:
        exits: [M], from 0, at which each image leaves.
        correct: [M], whether its answer there is right; only such images are shown.

    Raises:
        RunError: no class has enough images at both ends.
    """
    for last in range(int(exits.max()), 0, -1):
        found = {
            int(label): [
                np.flatnonzero(correct & (labels == label) & (exits == place))[:rows_each] for place in (0, last)
            ]
            for label in np.unique(labels)
        }
        full = [label for label, ends in found.items() if min(map(len, ends)) == rows_each]
        if full:
            chosen = full[:n_classes]
            easy, hard = (np.stack([found[label][end] for label in chosen], axis=1) for end in (0, 1))
            return Sheet(chosen, easy, hard, last + 1)
    raise RunError(
        f"no class has {rows_each} correct answers both at the first exit and at a later one: give "
        "another budget (--fraction), or train the network longer"
    )


def draw_sheet(folder: RunFolder, images: ImageSet, fraction: float) -> Path:
    """Draw `sheet.png` into a run's folder, for the chosen policy at a fraction of the full network's cost.

    Raises:
        RunError: the run has not been evaluated, or `images` is not the set it was calibrated on.
    """
    record = CalibrationRecord.load(folder)
    evaluation = Evaluation.load(folder, record)
    heldout, test = ExitOutputs.load(folder.heldout), ExitOutputs.load(folder.test)
    if images.name != record.data_name or not np.array_equal(images.test_labels, test.labels):
        raise RunError(f"{folder.path}: calibrated on other images than --data holds; give the images of this run")
    costs = [result.executed_mflops for result in evaluation.exits]
    scores = fit_scores(heldout)[evaluation.policy.score]
    frontier = build_frontier(scores.heldout, heldout.correct, costs, evaluation.policy.family)
    point = frontier.at_cost(fraction * costs[-1])
    exits = take_exits(scores.of(evaluation.policy.score, test), point.thresholds)
    right = test.correct[np.arange(len(exits)), exits]
    sheet = choose_images(exits, right, test.labels, N_CLASSES, ROWS_EACH)
    path = folder.path / "sheet.png"
    title = f"Test images answered right at {point.cost:.1f} M multiply-adds on average"
    with figure_axes(path, title, n_columns=1) as (axes,):
        _draw(axes, images, sheet)
    return path


def _draw(axes: Axes, images: ImageSet, sheet: Sheet) -> None:
    size_px, (n_rows, n_columns) = images.image_size_px, sheet.easy.shape
    gap_px = size_px // 2  # between easy and hard images
    mosaic = np.full(((2 * n_rows * size_px) + gap_px, n_columns * size_px, 3), 255, np.uint8)
    for start_px, rows in ((0, sheet.easy), (n_rows * size_px + gap_px, sheet.hard)):
        for (i, j), row in np.ndenumerate(rows):
            top, left = start_px + i * size_px, j * size_px
            mosaic[top : top + size_px, left : left + size_px] = images.test_images[row]
    axes.imshow(mosaic, interpolation="nearest")
    axes.set_xticks([(j + 0.5) * size_px for j in range(n_columns)])
    names = [images.class_names[label].replace("_", " ") for label in sheet.classes]
    axes.set_xticklabels(names, rotation=40, ha="right", rotation_mode="anchor")
    half_px = n_rows * size_px / 2
    axes.set_yticks([half_px, mosaic.shape[0] - half_px])
    axes.set_yticklabels(["leave at exit 1", f"leave at exit {sheet.last_exit}"], rotation=90, va="center")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
