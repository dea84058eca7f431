import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.data import REPOSITORY
from tests.training import tiny
from training.errors import TrainingError
from training.objectives import network_of
from training.recipe import RECIPE_FOLDER, Augmentation, Recipe, RecipeError, Weighting
from training.study import Study, StudyError

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


def test_the_papers_recipe_has_the_papers_settings() -> None:
    boosted, joint = Recipe.load("cifar100-paper"), Recipe.load("cifar100-paper-joint")
    o = boosted.optimisation
    assert (o.epochs, o.batch_rows, o.learning_rate, o.milestones, o.decay) == (300, 64, 0.1, [150, 225], 0.1)
    assert (o.momentum, o.nesterov, o.weight_decay) == (0.9, False, 1e-4)
    assert boosted.objective.temperatures == [0.5]
    assert boosted.network.arguments == {"config": "C-any"}
    assert joint.objective.name == "joint"
    assert joint.optimisation == o


def test_the_l2w_den_recipe_has_its_authors_settings() -> None:
    recipe = Recipe.load("cifar100-weighted-paper")
    o = recipe.optimisation
    assert (o.epochs, o.batch_rows, o.learning_rate, o.schedule) == (300, 512, 0.8, "cosine")
    assert (o.momentum, o.nesterov, o.weight_decay) == (0.9, False, 1e-4)
    assert recipe.objective.weighting == Weighting(
        meta_interval=1, ratio=0.75, delta=0.8, mean="col", learning_rate=1e-4, weight_decay=1e-4
    )
    assert recipe.network.arguments == {"config": "C-lin-5"}
    assert recipe.objective.gradient_rescaling == "off"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs = 2", "epochs = 0"), r"optimisation\.epochs: .*greater than or equal to 1"),
        (("learning_rate", "learning_rte"), r"optimisation\.learning_rte: there is no such field; .* learning_rate,"),
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


@pytest.mark.parametrize(("load", "error"), [(Recipe.load, RecipeError), (Study.load, StudyError)])
def test_a_file_in_another_encoding_is_refused(
    tmp_path: Path, load: Callable[[str], object], error: type[TrainingError]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes('description = "café"'.encode("latin-1"))
    with pytest.raises(error, match=r"mine\.toml: .*utf-8"):
        load(str(path))


def test_the_mark_with_which_some_editors_begin_a_file_is_skipped(tmp_path: Path) -> None:
    path, study = tiny.write_recipe(tmp_path / "tiny.toml"), tmp_path / "study.toml"
    wanted = Recipe.load(str(path))
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert Recipe.load(str(path)) == wanted
    study.write_text(f'\ufeffdescription="x"\nrecipe="{path}"\nbaseline="a"\n[variants.a]\nlabel="a"', encoding="utf-8")
    assert Study.load(str(study)).baseline == "a"


@pytest.mark.parametrize(
    "setting",
    [
        "optimisation.learning_rate=inf",
        "optimisation.decay=nan",
        "optimisation.decay=0.0",
        "optimisation.momentum=-0.1",
        "optimisation.momentum=1.0",
        "optimisation.weight_decay=-1e-4",
        "objective.temperatures=[nan]",
    ],
)
def test_an_invalid_number_names_its_field(setting: str) -> None:
    with pytest.raises(RecipeError, match=setting.partition("=")[0]):
        Recipe.load("cifar100-fast", [setting])


def test_nesterov_requires_momentum() -> None:
    with pytest.raises(RecipeError, match="set momentum above 0, or nesterov = false"):
        Recipe.load("cifar100-fast", ["optimisation.momentum=0", "optimisation.nesterov=true"])


def test_every_field_of_a_recipe_is_documented() -> None:
    told = (REPOSITORY / "docs" / "training.md").read_text()
    for section, field in Recipe.model_fields.items():
        fields = dict(getattr(field.annotation, "model_fields", {section: None}))
        if section == "objective":
            fields |= Weighting.model_fields
        for name in fields.keys() - {"description", "weighting"}:
            assert re.search(rf"`[a-z.]*\b{name}`", told), f"{section}.{name}"


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
        network_of(tiny.recipe(objective={"temperatures": [0.1, 0.2, 0.3]}), 4)


@pytest.mark.parametrize(
    ("n_images", "batch_rows", "steps"),
    [(45000, 128, 352), (64, 16, 4), (67, 16, 4), (68, 16, 5), (15, 16, 1), (3, 16, 0)],
)
def test_a_last_batch_below_a_quarter_is_dropped(n_images: int, batch_rows: int, steps: int) -> None:
    optimisation = tiny.recipe(optimisation={"batch_rows": batch_rows}).optimisation
    assert optimisation.steps_per_epoch(n_images) == steps


def test_settings_change_single_fields(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "tiny.toml")
    changed = Recipe.load(
        str(path), ["optimisation.epochs=7", "objective.name='joint'", "network.arguments.base=2", "held_out_images=5"]
    )
    assert (changed.optimisation.epochs, changed.optimisation.batch_rows) == (7, 16)
    assert changed.objective.name == "joint"
    assert changed.network.arguments == {**Recipe.load(str(path)).network.arguments, "base": 2}
    assert changed.held_out_images == 5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimisation.epochs", "section.field=value"),
        ("objective.name=joint", "quote text"),
        ("optimisation.epoch=3", r"optimisation\.epoch: there is no such field; choose from epochs, batch_rows,"),
        ("optimizer.epochs=3", r"optimizer: there is no such field; .*optimisation,"),
        ("optimisation=3", "optimisation"),
        ("augmentation.crop_area=[0.9,0.2]", "smallest, largest"),
        ("augmentation.crop_area=[0.2,0.9]", "crop_padding_px = 0"),
        ("augmentation.sizes_px=[32]", "set crop_area too"),
        ("held_out_images=1", "held_out_images: .*greater than or equal to 2"),
        ("network.arguments.n_classes=7", r"network\.arguments\.n_classes: leave it out; it comes from the class f"),
        ("network.arguments.temperatures=[0.1]", r"arguments\.temperatures: .*it comes from objective\.temperatures"),
    ],
)
def test_a_setting_that_does_not_fit_is_explained(tmp_path: Path, setting: str, message: str) -> None:
    path = tiny.write_recipe(tmp_path / "tiny.toml")
    with pytest.raises(RecipeError, match=message):
        Recipe.load(str(path), [setting])


def test_image_sizes_divide_the_run_into_equal_parts() -> None:
    resized = Augmentation(crop_padding_px=0, crop_area=(0.3, 1.0), sizes_px=[16, 24, 32])
    assert [resized.size_px(step, 7) for step in range(7)] == [16, 16, 16, 24, 24, 32, 32]
    assert Augmentation().size_px(3, 7) is None


def test_gates_and_mixed_images_cannot_be_combined() -> None:
    tiny.recipe(objective={"gates": 0.3})
    with pytest.raises(ValueError, match="leave out cutmix"):
        tiny.recipe(objective={"gates": 0.3}, augmentation={"cutmix": 0.5})
