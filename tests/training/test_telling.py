"""The messages of a run: speed and remaining time, and classes without images."""

import numpy as np
import pytest

from training.image_set import ImageSet, Split
from training.recipe import Augmentation
from training.telling import classes_without, images_left, speed

GROWING = Augmentation(crop_padding_px=0, crop_area=(0.3, 1.0), sizes_px=[100, 100, 200])


def test_images_of_one_size_count_equally() -> None:
    assert images_left(Augmentation(), 30, 120, 64.0, 32) == 90 * 64
    assert images_left(Augmentation(), 120, 120, 64.0, 32) == 0


@pytest.mark.parametrize(
    ("step", "steps_worth"),
    [(1, 79 + 40 * 4), (40, 40 + 40 * 4), (80, 40 * 4), (81, 39), (100, 20), (120, 0)],
)
def test_later_larger_images_count_by_their_pixels(step: int, steps_worth: float) -> None:
    """At step 80, the speed is still that of small images; 40 steps with four times the pixels remain."""
    assert images_left(GROWING, step, 120, 10.0, 200) == pytest.approx(10 * steps_worth)


def test_speed_and_time_left() -> None:
    assert speed(50.0, 9000.0) == "50 images/s, 3 min left"


def test_classes_without_training_or_test_images_are_named() -> None:
    blank = np.zeros((4, 8, 8, 3), np.uint8)
    labels = np.array([0, 0, 1, 2])
    images = ImageSet("mine", blank, labels, blank, np.array([0, 2, 2, 2]), ["a", "b", "c"], (0, 0, 0), (1, 1, 1))
    assert classes_without(images, Split(np.array([0, 2]), np.array([1, 3]))) == [
        "no training image in: c (all are held out: add images, or hold out fewer)",
        "no test image in: b (so accuracy on these is not measured)",
    ]
