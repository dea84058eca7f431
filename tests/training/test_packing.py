"""The description of a bundle."""

from typing import Any

import pytest

from tests.training import tiny
from training.model_card import augmentation_text
from training.packing import describe
from training.recipe import Augmentation, Recipe

CIFAR = Recipe.load("cifar100-fast").description


@pytest.mark.parametrize(
    ("recipe", "images", "told"),
    [
        (Recipe.load("cifar100-fast"), "cifar100", CIFAR),
        (Recipe.load("cifar100-fast"), "flowers", "msdnet C-batch-4 on flowers, 3 classes"),
        (Recipe.load("image-folder"), "flowers", "msdnet I-4 on flowers, 3 classes"),
        (tiny.recipe(), "flowers", "tiny"),
    ],
)
def test_a_recipes_description_is_not_used_for_other_images(recipe: Recipe, images: str, told: str) -> None:
    assert describe(recipe, images, 3) == told


@pytest.mark.parametrize(
    ("augmentation", "text"),
    [
        ({"cutout_px": 8}, "random crops with 4 px of padding, squares of 8 px cut out, and horizontal flips."),
        (
            {"crop_padding_px": 0, "crop_area": (0.35, 1.0), "sizes_px": [24, 32]},
            "random crops of 35% to 100% of the area, resized to 24, 32 px in equal parts of the run, "
            "and horizontal flips.",
        ),
        ({"cutmix": 0.5}, "random crops with 4 px of padding, CutMix in 50% of the batches, and horizontal flips."),
        ({"crop_padding_px": 0}, "horizontal flips."),
    ],
)
def test_a_model_card_names_every_augmentation(augmentation: dict[str, Any], text: str) -> None:
    assert augmentation_text(Augmentation(**augmentation)) == text
