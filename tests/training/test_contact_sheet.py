"""Which images the contact sheet shows: correctly classified ones of the right exits, in the set's order."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training import tiny
from training.calibration import ExitOutputs, calibrate
from training.checkpoint import RunError, RunFolder
from training.contact_sheet import Sheet, _draw, choose_images, draw_sheet
from training.evaluation import cost_of, evaluate
from training.figures import figure_axes
from training.image_set import ImageSet
from training.loop import Trainer
from training.processes import Processes

LABELS = np.repeat([0, 1, 2], 8)
EXITS = np.tile([0, 0, 3, 3, 0, 3, 2, 1], 3)
RIGHT = np.ones(24, np.bool_)


def test_it_shows_the_first_correct_images_of_the_first_and_last_exit() -> None:
    right = RIGHT.copy()
    right[8] = False  # the first easy image of class 1 is answered wrong
    right[[18, 19]] = False  # class 2 has one hard image left: too few
    sheet = choose_images(EXITS, right, LABELS, n_classes=5, rows_each=2)
    assert sheet.classes == [0, 1]
    assert sheet.easy.tolist() == [[0, 9], [1, 12]]
    assert sheet.hard.tolist() == [[2, 10], [3, 11]]
    assert sheet.last_exit == 4


def test_it_uses_the_deepest_exit_with_enough_correct_images() -> None:
    exits = np.where(EXITS == 3, 2, EXITS)
    exits[2] = 3
    assert choose_images(exits, RIGHT, LABELS, n_classes=3, rows_each=3).last_exit == 3
    with pytest.raises(RunError, match=r"another budget \(--fraction\), or train the network longer"):
        choose_images(np.zeros(24, np.intp), RIGHT, LABELS, n_classes=3, rows_each=2)


def test_it_is_drawn(tmp_path: Path) -> None:
    images = tiny.image_set(tmp_path / "cifar")
    sheet = Sheet([0, 1], np.array([[0, 1], [4, 5]]), np.array([[8, 9], [12, 13]]), last_exit=3)
    with figure_axes(tmp_path / "sheet.png", "title") as (axes,):
        _draw(axes, images, sheet)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["red", "green"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["leave at exit 1", "leave at exit 3"]
        mosaic = np.asarray(axes.get_images()[0].get_array())
    assert np.array_equal(mosaic[:32, 32:64], images.test_images[1])
    assert np.array_equal(mosaic[-32:, :32], images.test_images[12])
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_it_needs_an_evaluated_run_and_its_own_images(tmp_path: Path) -> None:
    images, folder = tiny.image_set(tmp_path / "cifar"), RunFolder(tmp_path / "run")
    Trainer(tiny.recipe(), images, folder, 0, Processes(0, 1, torch.device("cpu"))).train()
    record = calibrate(folder, images, torch.device("cpu"))
    with pytest.raises(RunError, match="not evaluated yet"):
        draw_sheet(folder, images, 0.5)
    evaluate(ExitOutputs.load(folder.heldout), ExitOutputs.load(folder.test), cost_of(folder, record)).save(
        folder, record
    )
    others = ImageSet(**{**vars(images), "test_labels": images.test_labels[::-1].copy()})
    with pytest.raises(RunError, match="calibrated on other images"):
        draw_sheet(folder, others, 0.5)
