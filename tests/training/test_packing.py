"""What a bundle is said to be."""

import pytest

from tests.training import tiny
from training.packing import describe
from training.recipe import Recipe

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
def test_a_recipe_for_other_images_does_not_describe_these(recipe: Recipe, images: str, told: str) -> None:
    assert describe(recipe, images, 3) == told
