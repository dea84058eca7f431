"""Runs from bundles: `unpack` recreates the run with the same numbers, and training can start from its weights.

Held-out images stay held out, and other classes get new last layers.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bundles import read_manifest, tiny_bundle, write_manifest
from tests.training import tiny
from training.calibration import CalibrationRecord, ExitOutputs, calibrate
from training.checkpoint import RunError, RunFolder
from training.evaluation import cost_of, evaluate
from training.image_set import DataError, ImageSet
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
def first(tmp_path_factory: pytest.TempPathFactory, images: ImageSet) -> RunFolder:
    """A trained run."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "first")
    Trainer(tiny.recipe(), images, folder, 0, ALONE, "python -m training train RUN").train()
    return folder


@pytest.fixture(scope="module")
def bundle(first: RunFolder, images: ImageSet) -> Path:
    return exported(first, images, first.path.parent / "first-bundle")


def started(path: Path, images: ImageSet, bundle: Path | None, recipe: Recipe | None = None, seed: int = 0) -> Trainer:
    return Trainer(recipe or tiny.recipe(), images, RunFolder(path), seed, ALONE, "train RUN", bundle)


def test_an_unpacked_run_calibrates_to_the_same_numbers(
    first: RunFolder, images: ImageSet, bundle: Path, tmp_path: Path
) -> None:
    again = RunFolder(tmp_path / "again")
    unpack(bundle, again, images)
    record, before = calibrate(again, images, CPU), CalibrationRecord.load(first)
    same = {"ensemble": None, "seconds": 0.0}  # the manifest has whole seconds
    assert record.model_copy(update=same) == before.model_copy(update=same)
    for one, other in ((first.heldout, again.heldout), (first.test, again.test)):
        made_first, made_again = ExitOutputs.load(one), ExitOutputs.load(other)
        assert np.array_equal(made_first.predictions, made_again.predictions)
        for name, scores in made_first.scores.items():  # equal within the tolerance of the fit
            np.testing.assert_allclose(made_again.scores[name], scores, atol=1e-3)


def test_the_bundle_answers_with_the_fitted_ensemble(first: RunFolder, bundle: Path) -> None:
    ensemble = CalibrationRecord.load(first).ensemble
    assert ensemble is not None
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["temperatures"] == manifest["arguments"]["temperatures"] == list(ensemble.temperatures)
    assert manifest["arguments"]["head_scales"] == list(ensemble.head_scales)


def test_an_existing_run_is_not_overwritten(first: RunFolder, images: ImageSet, bundle: Path) -> None:
    with pytest.raises(RunError, match="holds a run already"):
        unpack(bundle, first, images)


def test_other_images_are_refused(images: ImageSet, bundle: Path, tmp_path: Path) -> None:
    fewer = ImageSet(
        **{**vars(images), "train_images": images.train_images[1:], "train_labels": images.train_labels[1:]}
    )
    with pytest.raises(DataError, match="another split"):
        unpack(bundle, RunFolder(tmp_path / "again"), fewer)
    with pytest.raises(DataError, match="trained on 'cifar100'"):
        unpack(bundle, RunFolder(tmp_path / "again"), ImageSet(**{**vars(images), "name": "others"}))
    with pytest.raises(DataError, match="added, removed or renamed"):
        unpack(bundle, RunFolder(tmp_path / "again"), ImageSet(**{**vars(images), "listing": "other.png"}))
    larger = {name: getattr(images, name).repeat(2, 1).repeat(2, 2) for name in ("train_images", "test_images")}
    with pytest.raises(DataError, match="of 32 px, but --data was read at 64 px"):
        unpack(bundle, RunFolder(tmp_path / "again"), ImageSet(**{**vars(images), **larger}))
    assert not (tmp_path / "again").exists()


def test_a_bundle_that_was_not_trained_here_is_refused(tmp_path: Path, images: ImageSet) -> None:
    with pytest.raises(RunError, match=r"manifest\.json"):
        unpack(tmp_path, RunFolder(tmp_path / "again"), images)
    with pytest.raises(RunError, match="does not record how it was trained"):
        unpack(tiny_bundle(tmp_path / "random"), RunFolder(tmp_path / "again"), images)


@pytest.mark.parametrize(("field", "value"), [("processes", None), ("seed", None), ("epochs", "two")])
def test_a_manifest_with_an_incomplete_training_record_is_refused(
    images: ImageSet, bundle: Path, tmp_path: Path, field: str, value: str | None
) -> None:
    changed = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = read_manifest(changed)
    manifest["training"][field] = value
    if field == "processes":
        del manifest["training"][field]
    write_manifest(changed, manifest)
    with pytest.raises(RunError, match="does not record how"):
        unpack(changed, RunFolder(tmp_path / "again"), images)
    assert not (tmp_path / "again").exists()


def test_an_unpacked_run_is_finished_whatever_its_objective(images: ImageSet, bundle: Path, tmp_path: Path) -> None:
    """Bundles do not contain the predictor of `weighted`, so training could not resume."""
    changed, again = Path(shutil.copytree(bundle, tmp_path / "bundle")), RunFolder(tmp_path / "again")
    manifest = read_manifest(changed)
    manifest["training"]["recipe"]["objective"]["name"] = "weighted"
    write_manifest(changed, manifest)
    unpack(changed, again, images)
    trainer = Trainer(again.read_recipe(), images, again, 0, ALONE)
    assert trainer.progress.step == trainer.total_steps
    assert trainer.train() == "finished"


def test_training_starts_from_the_weights_of_the_bundle(
    tmp_path: Path, first: RunFolder, images: ImageSet, bundle: Path
) -> None:
    trainer = started(tmp_path / "second", images, bundle)
    for name, value in first.load_checkpoint()["network"].items():
        assert torch.equal(trainer.network.state_dict()[name], value), name
    assert trainer.progress.step == 0
    assert trainer.held_out_accuracy() == first.read_log()[-1]["held_out_accuracy"]
    assert trainer.train() == "finished"

    version = json.loads((bundle / "manifest.json").read_text())["version"]
    description = trainer.folder.read_description()
    assert description["from"] == f"first-bundle {version}"
    assert str(tmp_path) not in json.dumps(description)
    # And from the resulting bundle, whose half-precision weights are widened.
    again = exported(trainer.folder, images, tmp_path / "second-bundle", half_weights=True)
    training = json.loads((again / "manifest.json").read_text())["training"]
    assert training["from"] == f"first-bundle {version}"
    assert training["before"] == json.loads((bundle / "manifest.json").read_text())["training"]
    assert f"started from the weights of `first-bundle {version}`" in (again / "README.md").read_text()
    assert CalibrationRecord.load(trainer.folder).split_sha256 == CalibrationRecord.load(first).split_sha256
    unpacked = RunFolder(tmp_path / "unpacked")
    unpack(again, unpacked, images)
    for name in ("from", "before", "precision"):  # its history is kept
        assert unpacked.read_description()[name] == description[name]
    third = started(tmp_path / "third", images, again).network.state_dict()
    for name, value in trainer.network.state_dict().items():
        assert third[name].dtype == value.dtype
        assert np.allclose(third[name], value, atol=1e-3)


def test_a_stopped_run_resumes_from_its_own_weights(tmp_path: Path, images: ImageSet, bundle: Path) -> None:
    started(tmp_path / "whole", images, bundle).train()
    while started(tmp_path / "pieces", images, bundle).train(time_limit_s=0) == "time limit":
        pass
    one, other = (RunFolder(tmp_path / name).load_checkpoint()["network"] for name in ("whole", "pieces"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(RunError, match="another start"):
        started(tmp_path / "pieces", images, None)


def test_images_the_network_was_trained_on_must_not_be_held_out(tmp_path: Path, images: ImageSet, bundle: Path) -> None:
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


def test_other_classes_get_a_fresh_last_layer(tmp_path: Path, first: RunFolder, images: ImageSet, bundle: Path) -> None:
    five = {"name": "others", "listing": "other.png", "class_names": ["a", "b", "c", "d", "e"]}
    others = ImageSet(**{**vars(images), **five})
    plain = started(tmp_path / "plain", others, None, seed=1).network.state_dict()
    network = started(tmp_path / "from", others, bundle, seed=1).network.state_dict()
    given = first.load_checkpoint()["network"]
    for name, value in network.items():
        assert torch.equal(value, plain[name] if ".classifier." in name else given[name]), name
    # The same number of different classes also gets new last layers.
    four = ImageSet(**{**vars(images), "name": "others", "class_names": ["a", "b", "c", "d"]})
    network = started(tmp_path / "four", four, bundle).network.state_dict()
    assert not torch.equal(network["heads.0.classifier.weight"], given["heads.0.classifier.weight"])


def test_temperatures_and_gates_start_from_the_recipe(tmp_path: Path, images: ImageSet, bundle: Path) -> None:
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


def test_plots_list_the_epochs_of_previous_runs() -> None:
    assert epochs_of({}, 2.5) == "2.5"
    assert epochs_of({"before": {"epochs": 40.0, "before": {"epochs": 5.0}}}, 12.0) == "5 + 40 + 12"
