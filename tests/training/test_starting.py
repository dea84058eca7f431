"""Runs that start from a bundle's weights: its held-out images stay held out, other classes get fresh last layers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training import tiny
from training.calibration import CalibrationRecord, ExitOutputs, calibrate
from training.checkpoint import RunError, RunFolder
from training.evaluation import cost_of, evaluate
from training.image_set import ImageSet
from training.loop import Trainer
from training.packing import pack
from training.plots import epochs_of, plot_run
from training.processes import Processes
from training.recipe import Recipe
from training.unpacking import unpack

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return tiny.image_set(tmp_path_factory.mktemp("data") / "cifar")


def exported(folder: RunFolder, images: ImageSet, bundle: Path, half_weights: bool = False) -> Path:
    record = calibrate(folder, images, CPU, half_weights)
    evaluation = evaluate(ExitOutputs.load(folder.heldout), ExitOutputs.load(folder.test), cost_of(folder, record))
    evaluation.save(folder, record)
    plot_run(folder, evaluation, record)
    pack(folder, bundle, bundle.name)
    return bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, images: ImageSet) -> Path:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "first")
    Trainer(tiny.recipe(), images, folder, 0, ALONE, "python -m training train RUN").train()
    return exported(folder, images, folder.path.parent / "first-bundle")


def started(path: Path, images: ImageSet, bundle: Path | None, recipe: Recipe | None = None, seed: int = 0) -> Trainer:
    return Trainer(recipe or tiny.recipe(), images, RunFolder(path), seed, ALONE, "train RUN", bundle)


def test_training_goes_on_from_the_weights_of_the_bundle(tmp_path: Path, images: ImageSet, bundle: Path) -> None:
    made = RunFolder(bundle.parent / "first")
    trainer = started(tmp_path / "second", images, bundle)
    for name, value in made.load_checkpoint()["network"].items():
        assert torch.equal(trainer.network.state_dict()[name], value), name
    assert trainer.progress.step == 0
    assert trainer.held_out_accuracy() == made.read_log()[-1]["held_out_accuracy"]
    assert trainer.train() == "finished"

    version = json.loads((bundle / "manifest.json").read_text())["version"]
    description = trainer.folder.read_description()
    assert description["from"] == f"first-bundle {version}"
    assert str(tmp_path) not in json.dumps(description)
    # And from what that makes: half-precision weights are widened.
    again = exported(trainer.folder, images, tmp_path / "second-bundle", half_weights=True)
    training = json.loads((again / "manifest.json").read_text())["training"]
    assert training["from"] == f"first-bundle {version}"
    assert training["before"] == json.loads((bundle / "manifest.json").read_text())["training"]
    assert f"went on from the weights of `first-bundle {version}`" in (again / "README.md").read_text()
    assert CalibrationRecord.load(trainer.folder).split_sha256 == CalibrationRecord.load(made).split_sha256
    unpacked = RunFolder(tmp_path / "unpacked")
    unpack(again, unpacked, images)
    for name in ("from", "before", "precision"):  # its past stays known
        assert unpacked.read_description()[name] == description[name]
    third = started(tmp_path / "third", images, again).network.state_dict()
    for name, value in trainer.network.state_dict().items():
        assert third[name].dtype == value.dtype
        assert np.allclose(third[name], value, atol=1e-3)


def test_a_run_that_was_stopped_goes_on_from_its_own_weights(tmp_path: Path, images: ImageSet, bundle: Path) -> None:
    started(tmp_path / "whole", images, bundle).train()
    while started(tmp_path / "pieces", images, bundle).train(time_limit_s=0) == "time limit":
        pass
    one, other = (RunFolder(tmp_path / name).load_checkpoint()["network"] for name in ("whole", "pieces"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(RunError, match="another start"):
        started(tmp_path / "pieces", images, None)


def test_images_that_a_network_was_trained_on_are_not_held_out(tmp_path: Path, images: ImageSet, bundle: Path) -> None:
    with pytest.raises(RunError, match=r"--seed 0 --set held_out_images=40"):
        started(tmp_path / "run", images, bundle, seed=1)
    renamed = ImageSet(**{**vars(images), "listing": "other.png"})
    with pytest.raises(RunError, match=r"give their folder another name"):
        started(tmp_path / "run", renamed, bundle)
    moved = ImageSet(**{**vars(images), "name": "the same in another folder"})
    with pytest.raises(
        RunError, match=r"would hold out.*--seed 0 --set held_out_images=40.*give the files other names"
    ):
        started(tmp_path / "run", moved, bundle, seed=1)
    assert not (tmp_path / "run").exists()
    assert started(tmp_path / "moved", moved, bundle).progress.step == 0  # the split is the bundle's


def test_other_classes_get_a_fresh_last_layer(tmp_path: Path, images: ImageSet, bundle: Path) -> None:
    five = {"name": "others", "listing": "other.png", "class_names": ["a", "b", "c", "d", "e"]}
    others = ImageSet(**{**vars(images), **five})
    plain = started(tmp_path / "plain", others, None, seed=1).network.state_dict()
    network = started(tmp_path / "from", others, bundle, seed=1).network.state_dict()
    given = RunFolder(bundle.parent / "first").load_checkpoint()["network"]
    for name, value in network.items():
        assert torch.equal(value, plain[name] if ".classifier." in name else given[name]), name
    # Classes may be others where they are as many.
    four = ImageSet(**{**vars(images), "name": "others", "class_names": ["a", "b", "c", "d"]})
    network = started(tmp_path / "four", four, bundle).network.state_dict()
    assert not torch.equal(network["heads.0.classifier.weight"], given["heads.0.classifier.weight"])


def test_what_is_learned_beside_the_network_starts_as_its_recipe_says(
    tmp_path: Path, images: ImageSet, bundle: Path
) -> None:
    recipe = tiny.recipe(objective={"learned_temperatures": True, "temperatures": [0.3], "gates": 0.1})
    trainer = started(tmp_path / "run", images, bundle, recipe)
    assert trainer.network.boosting.temperatures == pytest.approx((0.3, 0.3))
    assert trainer.train() == "finished"


def test_another_network_is_refused(tmp_path: Path, images: ImageSet, bundle: Path) -> None:
    wider = tiny.recipe()
    wider = wider.model_copy(
        update={"network": wider.network.model_copy(update={"arguments": {**wider.network.arguments, "base": 2}})}
    )
    with pytest.raises(RunError, match="not the network of this recipe"):
        started(tmp_path / "run", images, bundle, wider)
    with pytest.raises(RunError, match="--from"):
        started(tmp_path / "run", images, tmp_path)


def test_plots_count_the_epochs_of_the_runs_before() -> None:
    assert epochs_of({}, 2.5) == "2.5"
    assert epochs_of({"before": {"epochs": 40.0, "before": {"epochs": 5.0}}}, 12.0) == "5 + 40 + 12"
