from pathlib import Path

import pytest
import torch

from tests.training import tiny
from training.objectives import network_of
from training.recipe import RECIPE_FOLDER, Recipe, RecipeError

SHIPPED = sorted(path.stem for path in RECIPE_FOLDER.glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_that_ships_loads_and_builds_its_network(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.description
    with torch.device("meta"):
        network = network_of(recipe, n_classes=7)
        size = 32 if name.startswith("cifar") else 224
        logits = network(torch.empty(2, 3, size, size))
    assert all(x.shape == (2, 7) for x in logits)
    assert len(logits) > 1


def test_the_paper_s_recipe_is_the_paper_s() -> None:
    boosted, joint = Recipe.load("cifar100-paper"), Recipe.load("cifar100-paper-joint")
    o = boosted.optimisation
    assert (o.epochs, o.batch_rows, o.learning_rate, o.milestones, o.decay) == (300, 64, 0.1, [150, 225], 0.1)
    assert (o.momentum, o.nesterov, o.weight_decay) == (0.9, False, 1e-4)
    assert boosted.objective.temperatures == [0.5]
    assert boosted.network.arguments == {"config": "C-any"}
    assert joint.objective.name == "joint"
    assert joint.optimisation == o


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs = 2", "epochs = 0"), r"optimisation\.epochs: .*greater than or equal to 1"),
        (("learning_rate", "learning_rte"), r"optimisation\.learning_rte: Extra inputs are not permitted"),
        (('schedule = "cosine"', 'schedule = "linear"'), r"optimisation\.schedule: .*'multistep', 'cosine'"),
        (('description = "tiny"', ""), "description: Field required"),
        (("crop_padding_px = 2", "crop_padding_px = -1"), r"augmentation\.crop_padding_px"),
        (("epochs = 2", "epochs = "), "not valid TOML"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(tiny.RECIPE.replace(*change))
    with pytest.raises(RecipeError, match=message) as told:
        Recipe.load(str(path))
    assert str(path) in str(told.value)


def test_an_unknown_recipe_lists_those_that_ship() -> None:
    with pytest.raises(RecipeError) as told:
        Recipe.load("cifar100-fats")
    assert all(name in str(told.value) for name in SHIPPED)


@pytest.mark.parametrize(
    "network",
    [
        {"architecture": "vgg"},
        {"arguments": {"config": "C-huge"}},
        {"arguments": {"config": "C-any", "n_blokcs": 3}},
        {"arguments": {"config": "C-any", "n_blocks": 0}},
    ],
)
def test_a_network_that_can_t_be_built_is_a_recipe_error(network: dict) -> None:
    with pytest.raises(RecipeError, match=r"network: "):
        network_of(tiny.recipe(network=network), 4)


def test_too_many_temperatures_are_a_recipe_error() -> None:
    with pytest.raises(RecipeError, match="temperatures"):
        network_of(tiny.recipe(objective={"temperatures": [0.1, 0.2, 0.3, 0.4]}), 4)


@pytest.mark.parametrize(
    ("n_images", "batch_rows", "steps"),
    [(45000, 128, 352), (64, 16, 4), (67, 16, 4), (68, 16, 5), (15, 16, 1), (3, 16, 0)],
)
def test_a_last_batch_of_less_than_a_quarter_is_left_out(n_images: int, batch_rows: int, steps: int) -> None:
    optimisation = tiny.recipe(optimisation={"batch_rows": batch_rows}).optimisation
    assert optimisation.steps_per_epoch(n_images) == steps
