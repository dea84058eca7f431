"""What a run says of the time it needs."""

import pytest

from training.recipe import Augmentation
from training.telling import images_left, speed

GROWING = Augmentation(crop_padding_px=0, crop_area=(0.3, 1.0), sizes_px=[100, 100, 200])


def test_images_of_one_size_count_one_each() -> None:
    assert images_left(Augmentation(), 30, 120, 64.0, 32) == 90 * 64
    assert images_left(Augmentation(), 120, 120, 64.0, 32) == 0


@pytest.mark.parametrize(
    ("step", "steps_worth"),
    [(1, 79 + 40 * 4), (40, 40 + 40 * 4), (80, 40 * 4), (81, 39), (100, 20), (120, 0)],
)
def test_larger_images_to_come_count_as_many_as_their_pixels(step: int, steps_worth: float) -> None:
    """At step 80 the speed is still that of small ones; 40 steps with four times the pixels are left."""
    assert images_left(GROWING, step, 120, 10.0, 200) == pytest.approx(10 * steps_worth)


def test_speed_and_time_left() -> None:
    assert speed(50.0, 9000.0) == "50 images/s, 3 min left"
